#!/usr/bin/env bash
# Study A: what a reward can teach that the demonstrations never showed. Every run behind results/odd_even.
# Each method gets 30,720 samples after the base policy.
# Run it from the repository root. Runs that $RUNS holds whole are kept: name an empty folder after a change of the code.
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run: as many side by side as there are cores, and repeatable
export runs=${RUNS:-runs/odd_even}
mkdir -p "$runs"

sft() { # out, policy, seed, flags
    grep -qs last "$1/evaluation.json" ||
        python sft.py --task odd_even --policy "$2" --seed "$3" --out "$1" --overwrite "${@:4}"
}
grpo() { # out, policy, seed, flags: the last of a flag counts
    if [ "$2" = autoencoder ]; then noise=0.5; else noise=0.1; fi
    grep -qs last "$1/evaluation.json" ||
        python grpo.py --task odd_even --policy "$2" --seed "$3" --out "$1" --overwrite --steps 60 --eval-every 20 \
            --save-every 1000 --exploration-noise "$noise" "${@:4}"
}
compare() { # policy, seed: every method from the same biased base policy
    local at="$runs/$1" base="$runs/$1/biased/seed$2"
    sft "$base" "$1" "$2"
    sft "$at/biased_longer/seed$2" "$1" "$2" --model "$base" --epochs 102.4 # of 300 odd sums
    sft "$at/full/seed$2" "$1" "$2" --model "$base" --epochs 51.2 --even-data-ratio 1 # of 600 sums
    grpo "$at/grpo/seed$2" "$1" "$2" --model "$base"
    grpo "$at/grpo_bonus/seed$2" "$1" "$2" --model "$base" --rewards closeness=1,even_bonus=1
    grpo "$at/grpo_adaptive/seed$2" "$1" "$2" --model "$base" --rewards closeness=1,even_adaptive=1
    grpo "$at/only_bonus/seed$2" "$1" "$2" --model "$base" --rewards even_bonus=1
}
sweep() { # policy: one setting after the other, seed 0
    local at="$runs/$1/sweep" base="$runs/$1/biased/seed0" values
    for value in 0.05 0.1 0.25 0.5; do
        sft "$at/base_$value" "$1" 0 --even-data-ratio "$value"
        grpo "$at/even_data_ratio/$value" "$1" 0 --model "$at/base_$value"
    done
    if [ "$1" = autoencoder ]; then values="0.1 0.25 1 2"; else values="0.02 0.2 0.4"; fi
    for value in $values; do grpo "$at/exploration_noise/$value" "$1" 0 --model "$base" --exploration-noise "$value"; done
    for value in 0.1 0.2 0.5 1; do
        grpo "$at/even_bonus/$value" "$1" 0 --model "$base" --rewards closeness=1,even_bonus=1 --even-bonus "$value"
    done
    for value in 20 120 240; do grpo "$at/steps/$value" "$1" 0 --model "$base" --steps "$value"; done
    for value in 3e-5 3e-4 1e-3; do grpo "$at/learning_rate/$value" "$1" 0 --model "$base" --learning-rate "$value"; done
}
side_by_side() { # one command a line; stops at the first that fails
    xargs -P "${JOBS:-2}" -I{} bash -c 'set -eE; trap "exit 255" ERR; {} > /dev/null 2>> "$runs/errors.log"' ||
        { tail -n 3 "$runs/errors.log" >&2; exit 1; }
}
export -f sft grpo compare sweep
for policy in transformer autoencoder; do echo "compare $policy 0"; done | side_by_side # the sweeps start from its base
{
    for policy in transformer autoencoder; do echo "sweep $policy"; done
    for policy in transformer autoencoder; do for seed in 1 2 3 4; do echo "compare $policy $seed"; done; done
} | side_by_side

rm -rf results/odd_even/*/
for evaluation in $(cd "$runs" && find . -name evaluation.json); do
    folder="results/odd_even/$(dirname "$evaluation")"
    mkdir -p "$folder"
    for file in run.json evaluation.json metrics.jsonl; do
        # Of fine-tuning only the result is shown, so that its thousand lines a run stay out.
        [ "$file" = metrics.jsonl ] && ! grep -q num_generations "$runs/$(dirname "$evaluation")/run.json" && continue
        cp "$runs/$(dirname "$evaluation")/$file" "$folder/"
    done
done
python results/odd_even.py
