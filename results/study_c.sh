#!/usr/bin/env bash
# Study C: rollouts of the policy 0, 1, 4 and 16 steps ago, with and without importance weights, and of a bfloat16 copy.
# Four rows, five seeds each, from the base policies of study B; half as many prompts a step as the main job.
# Run it from the repository root. Runs that $RUNS holds whole are kept: name an empty folder after a change of the code.
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run: as many side by side as there are cores, and repeatable
export runs=${RUNS:-runs}

base() { # seed
    [ -e "$runs/base/seed$1/model.safetensors" ] ||
        python sft.py --task arithmetic --seed "$1" --out "$runs/base/seed$1" --overwrite
}
train() { # setting, seed, flags
    local out="$runs/stale/$1/seed$2"
    grep -qs last "$out/evaluation.json" ||
        python grpo.py --task arithmetic --seed "$2" --model "$runs/base/seed$2" --out "$out" --overwrite \
            --batch-size 16 --num-inner-updates 2 --eval-every 20 --eval-limit 250 --save-every 1000 "${@:3}"
}
side_by_side() { # one command a line; stops at the first that fails
    xargs -P "${JOBS:-2}" -I{} bash -c 'set -eE; trap "exit 255" ERR; {} > /dev/null 2>> "$runs/errors.log"' ||
        { tail -n 3 "$runs/errors.log" >&2; exit 1; }
}
export -f base train
mkdir -p "$runs"
for seed in 0 1 2 3 4; do echo "base $seed"; done | side_by_side
for seed in 0 1 2 3 4; do
    for name in grpo rloo cispo gspo; do
        echo "train ${name}_0 $seed --algorithm $name"
        for lag in 16 4 1; do
            echo "train ${name}_$lag $seed --algorithm $name --rollout-lag $lag"
            echo "train ${name}_${lag}_truncate $seed --algorithm $name --rollout-lag $lag --correction truncate"
        done
    done
    echo "train grpo_bfloat16 $seed --algorithm grpo --sampler-dtype bfloat16"
done | side_by_side

rm -rf results/stale/*/
for run in "$runs"/stale/*/seed*; do
    folder="results/${run#"$runs/"}"
    mkdir -p "$folder"
    cp "$run/run.json" "$run/metrics.jsonl" "$run/evaluation.json" "$folder/"
done
python results/stale.py
