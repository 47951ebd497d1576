#!/usr/bin/env bash
# Study B: reward structures and algorithms on arithmetic, five seeds each from the same base policies.
# Run it from the repository root.
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run: as many side by side as there are cores, and repeatable
export runs=${RUNS:-runs} algorithms="grpo dr_grpo dapo gspo cispo rloo pairwise"
export SHAPED=answer_format=0.2,answer_near=0.2,answer_exact=0.6

train() { # out, seed, flags
    [ -e "$1/evaluation.json" ] && grep -q last "$1/evaluation.json" && return # made already
    python grpo.py --task arithmetic --seed "$2" --model "$runs/base/seed$2" --out "$1" --overwrite "${@:3}"
}
seed() {
    [ -e "$runs/base/seed$1/model.safetensors" ] ||
        python sft.py --task arithmetic --seed "$1" --out "$runs/base/seed$1" --overwrite
    # Two inner updates, since with one the ratio is 1 and no clip acts.
    for name in $algorithms; do
        train "$runs/algorithms/$name/seed$1" "$1" --algorithm "$name" --num-inner-updates 2
    done
    train "$runs/algorithms/grpo_without_kl/seed$1" "$1" --algorithm grpo --num-inner-updates 2 --beta 0
    train "$runs/rewards/shaped/seed$1" "$1" --rewards "$SHAPED"
    for name in hard soft perplexity; do
        train "$runs/rewards/$name/seed$1" "$1" --rewards "$name=1"
    done
}
export -f seed train
mkdir -p "$runs"
printf '%s\n' 0 1 2 3 4 | xargs -P "${JOBS:-2}" -I{} bash -c 'seed {} > /dev/null 2> "$runs/seed{}.log"'

for run in "$runs"/algorithms/*/seed* "$runs"/rewards/*/seed*; do
    folder="results/${run#"$runs/"}"
    mkdir -p "$folder"
    cp "$run/run.json" "$run/metrics.jsonl" "$run/evaluation.json" "$folder/"
done
python plot_metrics.py results/algorithms/*/seed* --out results/algorithms --baseline grpo
python plot_metrics.py results/rewards/*/seed* --out results/rewards --baseline "$SHAPED"
