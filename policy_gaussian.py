"""An autoencoder as a policy, whose completions are real numbers: study A's other policy.

Shapes: P prompts, G completions of each, B = P * G rows (prompt-major).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from commands import UserError, printable
from rewards import to_number
from rollouts import Rollout, checked, row_uniforms
from tasks import Example


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an `Autoencoder`."""

    numbers: int  # the inputs are integers from 0 to numbers - 1
    hidden_size: int = 128
    bottleneck: int = 8
    model_type: str = "autoencoder"

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "AutoencoderConfig":
        """Read the dictionary of a `config.json`; raises ValueError."""
        for name in ("numbers", "hidden_size", "bottleneck"):
            if type(values.get(name)) is not int or not 0 < values[name] < 2**16:
                raise ValueError(f"{name} is {values.get(name)!r}, not a size")
        return cls(values["numbers"], values["hidden_size"], values["bottleneck"])


class Autoencoder(nn.Module):
    """Two integers, one-hot, through an encoder, a bottleneck and a decoder to one real number.

    One-hot inputs tie no number to its neighbours: what is not taught follows from other pairs or not at all.
    """

    checkpointing = False  # there is nothing to save
    max_length = 3  # two inputs, one output
    weights, load_weights = nn.Module.state_dict, nn.Module.load_state_dict  # a checkpoint holds them as they are

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        inputs, hidden, code = 2 * config.numbers, config.hidden_size, config.bottleneck
        self.encoder = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw uniform weights within 1 / sqrt(inputs), PyTorch's own default; biases and the one-hot table are 0.

        With the table at 0 no number differs from another before the data say so.
        """
        for name, weight in self.named_parameters():
            drawn = name.endswith("weight") and not name.startswith("encoder.0")
            bound = weight.shape[-1] ** -0.5 if drawn else 0.0
            nn.init.uniform_(weight, -bound, bound, generator=generator)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """The mean (P,) for int64 pairs (P, 2); the network's own output is in units of how many numbers there are."""
        inputs = F.one_hot(pairs, self.config.numbers).flatten(1).to(self.encoder[0].weight.dtype)
        return self.config.numbers * self.decoder(self.encoder(inputs))[:, 0]


class GaussianPolicy:
    """An autoencoder as a policy: a completion is one real number, normal around the network's output.

    The action (B, 1) stands where a language model has token ids. `exploration_noise` is the standard deviation;
    temperature, end tokens and truncation do not apply.
    """

    chat = False
    dtype = torch.float32
    end_ids: tuple[int, ...] = ()
    layout = "packed"

    def __init__(self, model: Autoencoder, exploration_noise: float = 0.5):
        if not exploration_noise > 0:
            raise UserError("--exploration-noise is the autoencoder's standard deviation; it must be above 0")
        self.model, self.exploration_noise = model, exploration_noise

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """The two integers of each question; raises UserError."""
        pairs = [list(map(int, re.findall(r"[0-9]{1,9}", prompt))) for prompt in prompts]
        for prompt, pair in zip(prompts, pairs, strict=True):
            if len(pair) != 2 or max(pair) >= self.model.config.numbers:
                reads = f"an autoencoder reads two integers from 0 to {self.model.config.numbers - 1}"
                raise UserError(f"question {printable(prompt)!r}: {reads}; ask for those, or take another --model")
        return pairs

    def fitting(self, splits: dict[str, list[Example]], max_new_tokens: int) -> dict[str, list[Example]]:
        return splits

    def demonstrations(self, examples: list[Example]) -> tuple[Rollout, torch.Tensor] | None:
        """A rollout of all demonstrations and their counts (B,), all 1; raises UserError where one is no number."""
        pairs = [(example.prompt, text) for example in examples for text in example.demonstrations]
        values = [to_number(text) for _, text in pairs]
        if None in values:
            raise UserError("--policy autoencoder learns numbers, which this task's demonstrations are not")
        if not pairs:
            return None
        prompts = torch.tensor(self.encode([prompt for prompt, _ in pairs]), device=self.device)
        actions = torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]
        rollout = self.rollout(prompts, 1, actions, [text for _, text in pairs])
        rollout.questions = [prompt for prompt, _ in pairs]
        return rollout, torch.ones_like(actions[:, 0])

    def rollout(self, prompts: torch.Tensor, group_size: int, actions: torch.Tensor, texts: list[str]) -> Rollout:
        """A rollout of prompts (P, 2) and of actions (B, 1), `group_size` for each prompt; all there is is real."""
        return Rollout(
            prompts=prompts,
            prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
            group=torch.arange(len(prompts), device=self.device).repeat_interleave(group_size),
            actions=actions,
            mask=torch.ones_like(actions, dtype=torch.bool),
            sampler_logp=torch.zeros_like(actions),
            truncated=torch.zeros(len(actions), dtype=torch.bool, device=self.device),
            texts=texts,
        )

    @torch.no_grad()
    def sample(
        self, examples: list[Example], group_size: int, key: Sequence[int], max_new_tokens: int,
        greedy: bool = False, first: int = 0, explore: bool = True,
    ) -> Rollout:  # fmt: skip
        """Draw `group_size` numbers for each example by inverse CDF, as in `TokenPolicy.sample`; greedy is the mean.

        `max_new_tokens` and `explore` change nothing: the noise is the policy.
        """
        pairs = torch.tensor(self.encode([example.prompt for example in examples]), device=self.device)
        mean = self.model(pairs).repeat_interleave(group_size)
        uniforms = row_uniforms(key, range(first, first + len(pairs)), group_size, 1)[:, 0]
        normal = torch.special.ndtri(uniforms).to(mean)
        actions = (mean if greedy else mean + self.exploration_noise * normal)[:, None]
        rollout = self.rollout(pairs, group_size, actions, [f"{value:.4f}" for value in actions[:, 0].tolist()])
        rollout.sampler_logp = self.log_probs(rollout)[0]
        rollout.questions = [example.question for example in examples]
        return checked(rollout)

    def log_probs(self, rollout: Rollout, entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-densities (B, 1) of the actions, with gradient, and entropies (B, 1) in nats."""
        sigma = self.exploration_noise
        score = (rollout.actions - self.means(rollout)) / sigma
        logp = -score.square() / 2 - math.log(sigma * math.sqrt(2 * math.pi))
        return logp, torch.full_like(logp, math.log(sigma * math.sqrt(2 * math.pi * math.e))).detach()

    def means(self, rollout: Rollout) -> torch.Tensor:
        return self.model(rollout.prompts)[rollout.group, None]

    def exact_kl(self, reference: "GaussianPolicy", rollout: Rollout) -> torch.Tensor:
        """KL (B, 1) towards a reference of the same noise, in closed form and without gradient."""
        with torch.no_grad():
            return (self.means(rollout) - reference.means(rollout)).square() / (2 * self.exploration_noise**2)
