#!/usr/bin/env bash
# Makes every run behind the figures and tables of the main job in results/README.md; about an hour on 2 cores.
# Run it from the repository root.
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run, so that two runs side by side are as fast as they can be, and repeatable
runs=${RUNS:-runs}

seed() {
    python grpo.py --task arithmetic --seed "$1" --out "$runs/main/seed$1"
    python grpo.py --task arithmetic --seed "$1" --out "$runs/long/seed$1" \
        --model "$runs/main/seed$1/base" --steps 120
    python grpo.py --task arithmetic --seed "$1" --out "$runs/shuffled/seed$1" \
        --model "$runs/main/seed$1/base" --rewards tests/shuffled.py:shuffled=1
}
export -f seed
export runs
mkdir -p "$runs"
printf '%s\n' 0 1 2 3 4 | xargs -P "${JOBS:-2}" -I{} bash -c 'set -e; seed {} > /dev/null 2> "$runs/seed{}.log"' ||
    { tail -n 3 "$runs"/seed*.log >&2; exit 1; }

for study in main long shuffled; do
    for number in 0 1 2 3 4; do
        mkdir -p "results/$study/seed$number"
        for file in run.json metrics.jsonl samples.jsonl evaluation.json; do
            cp "$runs/$study/seed$number/$file" "results/$study/seed$number/"
        done
    done
    python plot_metrics.py results/$study/seed* --out "results/$study"
done
python results/table.py
