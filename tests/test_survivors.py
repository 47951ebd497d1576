"""Exact values at the edges: each test is here because a small change of a formula passed all the others."""

import hashlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from steps import rewards_of

from commands import UserError
from grpo import Algorithm, GRPOConfig, GRPORun, is_flat, kl_penalty, policy_loss
from inference import bootstrap, measure_rollout, results_table, sampled_results, show_number
from policy import log_distribution
from rewards import (
    Rewards,
    answer_exact,
    answer_last,
    answer_near,
    char_length,
    distance,
    even_adaptive,
    even_bonus,
    nearest_exact,
    overlap,
    soft,
    token_length,
)
from rollouts import Rollout, join, micro_batches
from sft import SFTConfig, batches, learning_rate_at
from states import Position
from tasks import Example, Source, arithmetic, find_task, gsm8k_example, odd_even, pose, smoltldr_example, take_prompts


def float64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_a_group_is_flat_at_any_value():
    assert is_flat(float64([[1, 1], [0, 1], [0, 0]])).tolist() == [True, False, True]


def loss_of(ratios, advantages, algorithm, ref=None):
    """Loss and metrics of rows with these ratios, all probabilities of the policy before the update being 1."""
    logp = float64(ratios).log()
    mask = torch.ones(logp.shape, dtype=torch.bool)
    loss, stats = policy_loss(logp, 0 * logp, float64(advantages), mask, algorithm, ref)
    return loss.item(), {name: value.item() for name, value in stats.items()}


def test_the_sequence_ratio_is_each_rows_own():
    """Ratios 2 and 8 make 4, ratios 1 and 1 make 1; advantages of 1: minus their mean."""
    loss, stats = loss_of([[2, 8], [1, 1]], [1, 1], Algorithm(ratio="sequence", epsilon_high=9.0))
    assert loss == pytest.approx(-2.5) and stats["ratio_max"] == pytest.approx(4)


def test_what_stands_on_the_edge_of_the_clip_is_not_counted():
    """A ratio of 1 that may not move at all, small advantages, and none."""
    still = Algorithm(epsilon=0.0, epsilon_high=0.0)
    assert [loss_of([[1.0]], [a], still)[1][name] for a in (-1, 1) for name in ("clip_low", "clip_high")] == [0] * 4
    stats = loss_of([[0.5], [0.5], [2.0], [2.0]], [0.5, -0.5, 0.5, -0.5], Algorithm())[1]
    assert (stats["clip_low"], stats["clip_high"]) == (1, 1)
    stats = loss_of([[0.5], [2.0]], [0, 0], Algorithm())[1]
    assert (stats["clip_low"], stats["clip_high"]) == (0, 0), "without an advantage nothing is removed"


def test_the_largest_ratio_is_that_of_a_token_and_not_of_the_padding():
    mask = torch.tensor([[True, False]])
    _, stats = policy_loss(float64([[0.5, 7]]).log(), torch.zeros(1, 2).double(), float64([1]), mask, Algorithm())
    assert stats["ratio_max"].item() == pytest.approx(0.5)


def test_the_kl_metrics_come_beside_the_others_and_know_their_limit():
    """log pi - log ref is -3 + 5, then -20 (exactly at the clamp) and -20.5 (beyond it)."""
    stats = loss_of([[math.exp(-3)]], [1], Algorithm(), float64([[-5]]))[1]
    assert stats["kl_k1"] == pytest.approx(2) and stats["tokens"] == 1
    for d, clamped in ((20.0, 0), (20.5, 1)):
        assert loss_of([[1.0]], [1], Algorithm(), float64([[d]]))[1]["kl_clamped"] == clamped
    assert kl_penalty(float64([0]), float64([20])).item() == pytest.approx(math.exp(20) - 21)


def test_the_first_draw_is_the_default():
    examples = [Example(str(i)) for i in range(50)]
    draws = [[e.prompt for e in take_prompts(examples, 1, 50, 0, *draw)] for draw in ((), (0,), (1,))]
    assert draws[0] == draws[1] != draws[2] and sorted(draws[1]) == sorted(draws[2])


def sampled(texts: list[str], mask=None, truncated=None) -> Rollout:
    rows, mask = len(texts), torch.ones(len(texts), 1).bool() if mask is None else torch.tensor(mask).bool()
    return Rollout(
        prompts=torch.ones(1, 1).long(),
        prompt_mask=torch.ones(1, 1).bool(),
        group=torch.zeros(rows).long(),
        actions=mask.long(),
        mask=mask,
        sampler_logp=torch.zeros(mask.shape),
        truncated=torch.zeros(rows).bool() if truncated is None else torch.tensor(truncated),
        texts=texts,
    )


def test_rewards_get_the_inputs_and_an_error_has_their_name():
    def scaled(completions, scale, **_):
        return [scale * len(text) for text in completions]

    total, _ = rewards_of({"scaled": (scaled, 2.0)}, [Example("?")], sampled(["a", "bb"]), scale=3.0)
    assert total.tolist() == [[6, 12]] and total.dtype == torch.float32
    with pytest.raises(UserError, match="reward scaled failed"):
        rewards_of({"scaled": (scaled, 1.0)}, [Example("?")], sampled(["a", "b"]))


def test_the_share_that_a_function_left_open_is_measured_even_where_it_is_none():
    def graded(completions, endpoint, **_):
        return [1.0, 2.0]

    def lone(completions, **_):
        return [None, 0.5]

    def pair(completions, **_):
        return [1.0, 3.0]

    mix = {"graded": (graded, 1.0), "lone": (lone, 0.0), "pair": (pair, 0.0)}
    _, means = rewards_of(mix, [Example("?")], sampled(["a", "b"]), endpoint=None)
    expected = {"missing/graded": 0, "reward/graded": 1.5, "reward_std/graded": math.sqrt(0.5)}
    expected |= {"missing/lone": 0.5, "reward/lone": 0.5}
    expected |= {"missing/pair": 0, "reward/pair": 2, "reward_std/pair": math.sqrt(2)}
    assert means == pytest.approx(expected)


def test_what_is_measured_on_a_rollout_by_hand():
    """Two groups of two: one flat; lengths 1, 3, 2 and 2; one of four cut; the accuracy unknown for one row."""
    given = [1.0, None, 0.0, 0.0]
    measures = {"accuracy": lambda **_: given, "mute": lambda **_: [None] * 4}
    mask = [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]]
    rollout = sampled(["a"] * 4, mask, [False, True, False, False])
    rewards = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    metrics = measure_rollout(rollout, rewards, [Example("p"), Example("q")], SimpleNamespace(metrics=measures))
    assert metrics == pytest.approx(
        {
            **{"reward": 1, "reward_std": math.sqrt(2 / 3), "accuracy": 1 / 3},
            **{"truncated": 0.25, "length": 2, "length_min": 1, "length_max": 3, "samples": 4, "tokens": 8},
        }
    )


def test_the_state_of_a_reward_goes_in_by_name_and_comes_out_as_json_reads_it():
    def counting(completions, state, **_):
        state["calls"] = state.get("calls", 0) + 1
        state["last"] = (1, 2)
        return [0.0] * len(completions)

    def spoiling(completions, state, **_):
        state["loss"] = math.nan
        return [0.0] * len(completions)

    state, rollout = {"calls": 6}, sampled(["a", "b"])
    Rewards({"counting": (counting, 1.0)})([Example("?")], rollout, state)
    assert state == {"calls": 7, "last": [1, 2]}
    with pytest.raises(UserError, match="what JSON cannot hold"):
        Rewards({"spoiling": (spoiling, 1.0)})([Example("?")], rollout, {})


def test_a_broken_measure_is_named():
    with pytest.raises(UserError, match="reward accuracy returned"):
        metrics = SimpleNamespace(metrics={"accuracy": lambda **_: []})
        measure_rollout(sampled(["a", "b"]), torch.eye(2)[:1], [Example("p")], metrics)


@pytest.mark.parametrize(
    ("settings", "stale", "metrics", "words"),
    [
        ({}, 99, {"kl": 99.0}, None),
        ({"patience": 3}, 2, {}, None),
        ({"patience": 3}, 3, {}, "no better validation score in 3 evaluations (--patience)"),
        ({"patience": 3}, 4, {}, "no better validation score in 4 evaluations (--patience)"),
        ({"kl_limit": 0.5}, 9, {}, None),
        ({"kl_limit": 0.5}, 9, {"kl": 0.5}, None),
        ({"kl_limit": 0.5}, 9, {"kl": 0.75}, "KL 0.750 is above --kl-limit 0.5"),
    ],
)
def test_when_training_stops_early(settings, stale, metrics, words):
    nothing = dict.fromkeys(("policy", "optimizer", "task", "data", "rewards", "reference"))
    position = Position(validations_since_best=stale)
    run = GRPORun(config=GRPOConfig(**settings), last_step=9, position=position, **nothing)
    assert run.reason_to_stop(metrics) == words


def written(prompts, group, actions, texts="abc", truncated=None) -> Rollout:
    """A rollout written out, whose padding is 0."""
    prompts, actions = torch.tensor(prompts), torch.tensor(actions)
    return Rollout(
        prompts=prompts,
        prompt_mask=prompts > 0,
        group=torch.tensor(group),
        actions=actions,
        mask=actions > 0,
        sampler_logp=-actions.float(),
        truncated=torch.tensor(truncated or [False] * len(actions)),
        texts=list(texts)[: len(actions)],
        questions=[f"ends with {row[-1]}" for row in prompts.tolist()],
    )


def values_of(rollout: Rollout) -> dict:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(rollout).items()}


def test_a_selection_by_hand():
    """Rows of two prompts; a single row's rollout is as narrow as it can be, and the order asked for is kept."""
    whole = written([[0, 0, 1], [2, 3, 4], [0, 5, 6]], [0, 0, 1, 2], [[7, 8, 0], [9, 0, 0], [1, 2, 3], [4, 0, 0]])
    whole.texts, whole.truncated = list("abcd"), torch.tensor([False, False, True, False])
    one = written([[1]], [0], [[9]], "b")
    assert values_of(whole.select(torch.tensor([1]))) == values_of(one)
    two = written([[0, 1], [5, 6]], [1, 0], [[4, 0], [7, 8]], "da")
    assert values_of(whole.select(torch.tensor([3, 0]))) == values_of(two)
    last = written([[2, 3, 4]], [0], [[1, 2, 3]], "c", [True])
    assert values_of(whole.select(torch.tensor([2]))) == values_of(last)


def test_rollouts_joined_by_hand():
    """Prompts are padded on the left and completions on the right, to the widest; groups are counted on."""
    one = written([[1, 2]], [0, 0], [[3, 0, 0], [4, 5, 6]], "ab", [False, True])
    two = written([[0, 7, 8], [9, 9, 9]], [1, 0], [[1, 1], [2, 0]], "cd", [True, False])
    three = written([[4]], [0], [[5]], "e")
    joined = join([one, two, three])
    expected = written(
        [[0, 1, 2], [0, 7, 8], [9, 9, 9], [0, 0, 4]],
        [0, 0, 2, 1, 3],
        [[3, 0, 0], [4, 5, 6], [1, 1, 0], [2, 0, 0], [5, 0, 0]],
        "abcde",
        [False, True, True, False, False],
    )
    assert values_of(joined) == values_of(expected)
    assert {name: value.dtype for name, value in vars(joined).items() if torch.is_tensor(value)} == {
        name: value.dtype for name, value in vars(expected).items() if torch.is_tensor(value)
    }


@pytest.mark.parametrize(("second", "parts"), [(5, [[0, 1]]), (4, [[0], [1]])])
def test_less_than_half_as_long_begins_a_micro_batch_if_the_last_is_large(second, parts):
    rollout = written([[1], [1]], [0, 1], [[1] * 10, [1] * second + [0] * (10 - second)])
    assert [rows.tolist() for rows in micro_batches(rollout, 60)] == parts  # 2 + 10 + 4 is above a quarter of it
    assert len(micro_batches(rollout, 1000)) == 1


def test_a_packed_rollout_lies_on_the_policys_device(random_policy):
    policy = random_policy()
    policy.model.to("meta")
    tensors = [value for value in vars(policy.pack([[3]], [[4]], [""])).values() if isinstance(value, torch.Tensor)]
    assert {value.device.type for value in tensors} == {"meta"}


def test_a_distribution_by_hand_over_the_last_of_three_dimensions():
    """1 to 3, at a temperature of 1/2 it is 1 to 9; half of it exploration; float32 at least, float64 where given."""
    logits = float64([[[0, math.log(3)], [7, 7 + math.log(3)], [-1, math.log(3) - 1]]])
    for temperature, noise, small in ((1.0, (), 1 / 4), (0.5, (), 1 / 10), (1.0, (0.5,), 3 / 8)):
        values = log_distribution(logits, temperature, *noise).exp()
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, float64([[[small, 1 - small]] * 3]), rtol=1e-12, atol=0)
    assert log_distribution(logits.bfloat16(), 1.0).dtype == torch.float32


def test_the_bootstrap_draws_the_same_samples_on_every_machine():
    """Published intervals depend on its seed and on its number of draws."""
    roots = np.sqrt(np.arange(10.0))  # whose means are all different
    assert bootstrap(roots) == pytest.approx((1.3476855814519768, 2.4544364655744735), abs=1e-9)
    assert bootstrap(roots, 50) == pytest.approx((1.4068137397979559, 2.469932817392548), abs=1e-9)


def test_results_of_four_samples_by_hand():
    """One and two of four right: 2 samples hold a right one with 1 - 3/6 and 1 - 1/6, 4 samples surely.

    Both problems, or either one twice, are drawn often enough that the intervals are the two values themselves.
    """
    task = SimpleNamespace(score="accuracy")
    scores = np.array([[1.0, 0, 0, 0], [0, 1, 0, 1]])
    assert sampled_results(task, {"accuracy": 3 / 8, "length": 7.0}, scores) == pytest.approx(
        {
            **{"sampled_accuracy": 3 / 8, "sampled_length": 7},
            **{"sampled_accuracy_low": 1 / 4, "sampled_accuracy_high": 1 / 2},
            **{"pass@2": 2 / 3, "pass@2_low": 1 / 2, "pass@2_high": 5 / 6},
            **{"pass@4": 1, "pass@4_low": 1, "pass@4_high": 1},
        }
    )
    assert [k for k in sampled_results(task, {}, scores[:, :3]) if "@" in k] == ["pass@2", "pass@2_low", "pass@2_high"]
    assert [k for k in sampled_results(task, {}, np.ones((1, 15))) if k[-1].isdigit()] == ["pass@2", "pass@4", "pass@8"]
    assert list(sampled_results(task, {}, scores[:, :1])) == ["sampled_accuracy_low", "sampled_accuracy_high"]
    other = sampled_results(SimpleNamespace(score="overlap"), {"overlap": 3 / 8}, scores)
    assert other == {"sampled_overlap": 3 / 8, "sampled_overlap_low": 1 / 4, "sampled_overlap_high": 1 / 2}
    assert sampled_results(SimpleNamespace(score="overlap"), {}, np.zeros((0, 4))) == {}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("problems", 1000, "1000"),
        ("accuracy", 0.07512, "7.5%"),
        ("pass@2", 1.0, "100.0%"),
        ("length", 12.3456, "12.35"),
        ("sampled_length", 5.0, "5"),
        ("mean_error", 0.98765, "0.9877"),
        ("reward", -0.5, "-0.5"),
        ("length_share", 0.5, "50.0%"),
    ],
)
def test_a_measure_as_text(name, value, text):
    assert show_number(name, value) == text


def test_a_table_of_results_character_by_character():
    first = {"step": 7, "problems": 40, "accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "length": 4.0}
    second = {"problems": 40, "accuracy": 1.0, "sampled_accuracy": 0.125, "pass@2": 0.25, "pass@2_low": 0.0}
    assert results_table({"base": first, "the best": second | {"pass@2_high": 0.5}}).splitlines() == [
        "                  base                  the best",
        "problems          40                    40",
        "greedy accuracy   50.0% [25.0%, 75.0%]  100.0%",
        "greedy length     4                     –",
        "sampled accuracy  –                     12.5%",
        "pass@2            –                     25.0% [0.0%, 50.0%]",
    ]


def test_a_warm_up_of_one_step_or_of_none_begins_at_the_top():
    for warmup in (0, 1):
        config = SFTConfig(learning_rate=2.0, warmup_steps=warmup)
        assert [learning_rate_at(config, step, 4) for step in (1, 2, 3, 4)] == [2.0, 1.5, 1.0, 0.5]
    assert learning_rate_at(SFTConfig(learning_rate=1.0, warmup_steps=2), 1, 4) == 0.5


def test_batches_are_these_row_numbers_on_every_machine():
    found = list(batches(5, 3, 4, seed=0))
    assert [batch.tolist() for batch in found] == [[0, 3, 4], [2, 1, 0], [2, 3, 1], [4, 4, 2]]
    assert {batch.dtype for batch in found} == {np.dtype(np.int64)}
    wide = [batch.tolist() for batch in batches(3, 7, 3, seed=0)]  # wider than a pass
    assert [len(batch) for batch in wide] == [7, 7, 7]
    rows = sum(wide, [])
    assert all(sorted(rows[i : i + 3]) == [0, 1, 2] for i in range(0, 21, 3))


def checksum(examples: list[Example]) -> str:
    return hashlib.sha256("\n".join(map(repr, examples)).encode()).hexdigest()[:16]


def test_the_demonstrations_never_move():
    """What a toy learns from, in every part; trained models are comparable only while these checksums stand."""
    assert {name: checksum(examples) for name, examples in arithmetic().items()} == {
        "train": "c096096c1eafb7f1",
        "validation": "7b3313ab59ec3460",
        "held_out": "bbc70b3d7fc5e875",
    }
    assert {name: checksum(examples) for name, examples in odd_even(0.5).items()} == {
        "train": "10280b80276a561c",
        "validation": "3759b527bd74c165",
        "held_out": "382efea4c63e9d12",
    }


@pytest.mark.parametrize(
    ("given", "held_out", "sizes"),
    [
        (3, 0, (1, 1, 1)),
        (23, 0, (19, 1, 3)),
        (24, 0, (19, 2, 3)),  # a tenth of 24, then a twentieth of 21, rounded up
        (20, 5, (19, 1, 5)),  # the source has held-out records of its own
        (10_040, 1, (9540, 500, 1)),  # a twentieth would be 502
    ],
)
def test_sizes_of_the_parts(monkeypatch, given, held_out, sizes):
    records = {"train": ([{"q": f"train {i}"} for i in range(given)], "here")}
    if held_out:
        records["held_out"] = ([{"q": f"test {i}"} for i in range(held_out)], "there")
    monkeypatch.setattr(Source, "records", lambda self, data: records)
    source = Source("hub", (None,), {}, lambda record: Example(record["q"]))
    splits = source.load("data")
    assert tuple(len(splits[name]) for name in ("train", "validation", "held_out")) == sizes
    order = [example.prompt for name in ("held_out", "validation", "train") for example in splits[name]]
    first = sizes[2] if held_out else 0
    for part in (order[:first], order[first:]):
        assert part == sorted(part, key=lambda text: hashlib.sha256(text.encode()).digest())


def test_held_out_questions_are_not_trained_on_and_empty_parts_are_named(monkeypatch):
    both = {"train": ([{"q": text} for text in "abcda"], ""), "held_out": ([{"q": text} for text in "bxbe"], "")}
    monkeypatch.setattr(Source, "records", lambda self, data: both)
    source = Source("hub", (None,), {}, lambda record: Example(record["q"]))
    splits = source.load("data")
    assert {example.prompt for example in splits["held_out"]} == set("bxe")
    assert sorted(example.prompt for name in ("train", "validation") for example in splits[name]) == list("acd")
    both["train"] = ([{"q": "a"}], "")
    with pytest.raises(UserError, match="too few records, train would be empty"):
        source.load("data")
    both["train"] = ([{"q": "a"}, {"x": "b"}], "there.jsonl")
    with pytest.raises(UserError, match="there.jsonl: record 2 lacks 'q'"):
        source.load("data")
    monkeypatch.setattr(Source, "records", lambda self, data: {"train": ([{"q": "a"}], "")})
    with pytest.raises(UserError, match="too few records, train, validation would be empty"):
        source.load("data")


@pytest.mark.parametrize(
    ("convert", "record", "example"),
    [
        (
            gsm8k_example,
            {"question": "q", "answer": " #### is 3*4 = <<3*4=12>>12\nso <<12*90=1080>>1,080 \n#### 1,080 "},
            Example("q", {"answer": "1080"}, ("#### is 3*4 = 12\nso 1,080\n<answer>1080</answer>",)),
        ),
        (
            smoltldr_example,
            {"prompt": "post", "completion": " It is. "},
            Example("post", {"reference": "It is."}, (" It is. ",)),
        ),
        (smoltldr_example, {"prompt": "post", "completion": " "}, None),
    ],
)
def test_records_become_these_examples(convert, record, example):
    assert convert(record) == example


def test_a_question_as_it_is_asked():
    task = replace(find_task("arithmetic"), chat_instruction="Tag it.", plain="Q: {question} ({instruction})")
    example = Example("1 + 1?", {"answer": "2"}, ("2",))
    chat = pose(task, example, chat=True)
    assert chat == replace(example, prompt=[{"role": "user", "content": "1 + 1?\nTag it."}], question="1 + 1?")
    assert pose(task, example, chat=False) == replace(example, prompt="Q: 1 + 1? (Tag it.)", question="1 + 1?")
    bare = pose(replace(task, chat_instruction=""), example, chat=True)
    assert bare.prompt == [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize("function", [answer_near, answer_exact, answer_last, soft, nearest_exact, distance, overlap])
def test_each_completion_has_one_answer(function):
    """A wrong number of answers is an error, and never cuts completions off."""
    column = "reference" if function is overlap else "answer"
    for count in (1, 3):
        with pytest.raises(ValueError, match="argument 2 is (shorter|longer)"):
            function(prompts=["q"] * 2, completions=["<answer>5</answer>", "5"], **{column: ["5"] * count})


def test_the_settings_that_rewards_have_without_being_told():
    """A bonus of 0.2, 200 characters, 50 tokens."""
    assert even_bonus(None, ["2", "3"]) == [0.2, 0.0]
    assert even_adaptive(None, ["2"], state={}) == [0.2]
    assert char_length(None, ["a" * 200, "a" * 100]) == [1, 1 / 1.5]
    assert token_length(None, None, completion_ids=[[0] * 50, [0] * 25]) == [1, 1 / 1.5]
