#!/usr/bin/env bash
# Study B: reward structures and algorithms on arithmetic, five seeds each from the same base policies.
# Run it from the repository root. Runs that $RUNS holds whole are kept: name an empty folder after a change of the code.
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run: as many side by side as there are cores, and repeatable
export runs=${RUNS:-runs}
export SHAPED=answer_format=0.2,answer_near=0.2,answer_exact=0.6

base() { # seed
    [ -e "$runs/base/seed$1/model.safetensors" ] ||
        python sft.py --task arithmetic --seed "$1" --out "$runs/base/seed$1" --overwrite
}
train() { # study/setting, seed, flags
    local out="$runs/$1/seed$2"
    grep -qs last "$out/evaluation.json" ||
        python grpo.py --task arithmetic --seed "$2" --model "$runs/base/seed$2" --out "$out" --overwrite "${@:3}"
}
side_by_side() { # one command a line; stops at the first that fails
    xargs -P "${JOBS:-2}" -I{} bash -c 'set -eE; trap "exit 255" ERR; {} > /dev/null 2>> "$runs/errors.log"' ||
        { tail -n 3 "$runs/errors.log" >&2; exit 1; }
}
export -f base train
mkdir -p "$runs"
for seed in 0 1 2 3 4; do echo "base $seed"; done | side_by_side
for seed in 0 1 2 3 4; do
    # Two inner updates, since with one the ratio is 1 and no clip acts.
    for name in dapo grpo dr_grpo gspo cispo rloo pairwise; do
        echo "train algorithms/$name $seed --algorithm $name --num-inner-updates 2"
    done
    echo "train algorithms/grpo_without_kl $seed --algorithm grpo --num-inner-updates 2 --beta 0"
    for name in luspo sapo gmpo dppo prime kimi maxrl passk gdpo; do
        echo "train more_rows/$name $seed --algorithm $name --num-inner-updates 2"
    done
    echo "train rewards/shaped $seed --rewards $SHAPED"
    for name in hard soft perplexity; do echo "train rewards/$name $seed --rewards $name=1"; done
done | side_by_side

for study in algorithms more_rows rewards; do
    rm -rf results/$study/*/
    for run in "$runs/$study"/*/seed*; do
        folder="results/${run#"$runs/"}"
        mkdir -p "$folder"
        cp "$run/run.json" "$run/metrics.jsonl" "$run/evaluation.json" "$folder/"
    done
done
python plot_metrics.py results/algorithms/*/seed* --out results/algorithms --baseline grpo
python plot_metrics.py results/algorithms/grpo/seed* results/more_rows/*/seed* --out results/more_rows --baseline grpo
python plot_metrics.py results/rewards/*/seed* --out results/rewards --baseline "$SHAPED"
