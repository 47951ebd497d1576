"""TRL's own loss, advantages, mask, scorer and sampler, as `check.py` asks for them.

    TRL_LOSS=dapo python tests/check.py tests/check_trl.py

TRL_LOSS is one of `LOSSES`; nothing of TRL is written again here, only called.
"""

import copy
import functools
import os
import tempfile

os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from check_cases import MAX_NEW_TOKENS, PAD_ID, theirs
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from model_toy import character_tokenizer

SAME_CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.2}
LOSSES = {  # loss_type and the settings of the row of that name
    "grpo": {"loss_type": "grpo", "beta": 0.04, **SAME_CLIP},
    "bnpo": {"loss_type": "bnpo", "beta": 0.04, **SAME_CLIP},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.0, **SAME_CLIP},
    "dapo": {"loss_type": "dapo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "beta": 0.0, "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "cispo": {"loss_type": "cispo", "beta": 0.0, "epsilon_low": 0.0, "epsilon_high": 5.0},  # its cap is absolute
}
LOSS = os.environ.get("TRL_LOSS", "grpo")


@functools.cache
def trainer(model, temperature: float = 1.0) -> GRPOTrainer:
    """A trainer on a model that shares its weights with the given one."""
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    made = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, num_generations=2, use_cpu=True, bf16=False,
            max_completion_length=MAX_NEW_TOKENS, temperature=temperature, report_to="none", beta=0.0, top_k=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": "1"}] * 2),
        processing_class=character_tokenizer(["0123456789"]),
    )  # fmt: skip
    made._tokenizer.pad_token_id = PAD_ID
    return made


def policy_loss(
    logp, old_logp=None, advantages=None, mask=None, ref_logp=None, max_new_tokens=16, step_rows=None, step_tokens=None
):
    made = trainer(theirs())
    for name, value in LOSSES[LOSS].items():
        setattr(made, name, value)
    made.max_completion_length = max_new_tokens
    made.importance_sampling_level = "sequence" if LOSS == "gspo" else "token"
    made.args.use_bias_correction_kl = False
    made.current_gradient_accumulation_steps = made.args.steps_per_generation = step_rows / len(mask)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros_like(logp), None)
    ids = torch.ones(mask.shape, dtype=torch.int64)
    return made._compute_loss(
        made.model.train(),
        {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old_logp,
            "ref_per_token_logps": ref_logp,
            "num_items_in_batch": torch.tensor(step_tokens),
        },
    )


def group_advantages(rewards):
    made = trainer(theirs())
    made.num_generations = made.num_generations_eval = rewards.shape[1]
    made.scale_rewards = "none" if LOSS == "dr_grpo" else "group"
    made.reward_funcs = [lambda completions, **_: rewards.flatten().tolist()]
    inputs = [{"prompt": "1"}] * rewards.numel()
    return made._generate_and_score_completions(inputs)["advantages"].view(rewards.shape)


def completion_mask(ids, end_ids):
    """Of what a model is said to have generated; TRL returns the ids that its mask keeps."""
    made = trainer(theirs())
    made.eos_token_ids, given = list(end_ids), made.model.generate
    made.model.generate = lambda input_ids, **_: torch.cat([input_ids, ids], 1)
    try:
        kept, _ = made._generate_single_turn([[1]] * len(ids), None, {}, 1)
    finally:
        made.model.generate = given
    return torch.tensor([[column < len(row) for column in range(ids.shape[1])] for row in kept])


def log_probs(model, prompts, completions, temperature=1.0):
    made, left, right = trainer(model, temperature), max(map(len, prompts)), max(map(len, completions))
    pairs = list(zip(prompts, completions, strict=True))
    ids = [[PAD_ID] * (left - len(p)) + p + c + [PAD_ID] * (right - len(c)) for p, c in pairs]
    real = [[0] * (left - len(p)) + [1] * len(p + c) + [0] * (right - len(c)) for p, c in pairs]
    own = vars(made).pop("_get_per_token_logps_and_entropies", None)  # that of policy_loss above
    try:
        return made._get_per_token_logps_and_entropies(made.model, torch.tensor(ids), torch.tensor(real), right)[0]
    finally:
        if own:
            made._get_per_token_logps_and_entropies = own


def sample(model, prompts, group_size, max_new_tokens, end_ids, temperature=1.0):
    made = trainer(model, temperature)
    made.eos_token_ids = list(end_ids)
    settings = {"eos_token_id": list(end_ids), "max_new_tokens": max_new_tokens, "pad_token_id": PAD_ID}
    made.generation_config.update(**settings)
    made.generation_kwargs |= settings
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    return made._generate_single_turn(rows, None, {}, group_size)[0]
