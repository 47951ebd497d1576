"""Memory of the recipes in results/README.md, as `--dry-run` says for the published sizes of each model.

    python tests/bench_recipes.py

writes each model's config.json and a byte-level BPE of 16,000 tokens into a temporary folder, no weights, and needs the
real texts that the tests use (GRPO_SHARED_DATA, see conftest.py).
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from test_real_models import CHATML, byte_tokenizer, write_data

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("GRPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = {
    "SmolLM-135M": transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    ),
    "Llama-3.2-1B-Instruct": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 5e5,
        },
    ),
    "Phi-3-mini-4k-instruct": transformers.Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        pad_token_id=0,
    ),
    "Qwen2.5-0.5B-Instruct": transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}

SMALL = "--dtype bfloat16 --gradient-checkpointing --batch-size 8 --num-generations 8"
RECIPES = [
    ("gsm8k", "Qwen2.5-0.5B-Instruct", SMALL),
    ("gsm8k", "Qwen2.5-0.5B-Instruct", "--dtype bfloat16 --batch-size 8 --num-generations 8"),
    ("smoltldr", "SmolLM-135M", "--batch-size 8 --num-generations 8"),
    ("aimo", "Llama-3.2-1B-Instruct", f"{SMALL} --max-new-tokens 1024"),
    ("math", "Phi-3-mini-4k-instruct", f"{SMALL} --algorithm pairwise"),
    ("alpaca", "Qwen2.5-0.5B-Instruct", f"{SMALL} --batch-size 16 --rewards overlap=1"),
]


def main() -> None:
    names = ("gsm8k/train.jsonl", "scitldr/train.jsonl")
    texts = [line for name in names for line in (SHARED / name).read_text().splitlines()[:3000]]
    tokenizer = byte_tokenizer(texts=texts, size=16000)
    kinds = {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, config in CONFIGS.items():
            config.architectures, config.eos_token_id = [kinds[config.model_type]], 0
            config.save_pretrained(root / name)
            tokenizer.chat_template = None if name == "SmolLM-135M" else CHATML
            tokenizer.save_pretrained(root / name)
        for task, name, flags in RECIPES:
            words = ["--task", task, "--data", str(write_data(task, SHARED, root)), "--model", str(root / name)]
            command = [sys.executable, str(ROOT / "grpo.py"), *words, "--dry-run", *flags.split()]
            print(f"{task}, {name}, {flags}\n{subprocess.check_output(command, text=True)}", flush=True)


if __name__ == "__main__":
    main()
