"""How many small changes of the pure functions the tests catch: mutmut's operators, one forked process per mutant.

    python -m pip install mutmut==3.8.1      # for development only, so in no requirements file
    OMP_NUM_THREADS=1 python tests/bench_mutation.py --out mutants.json

--only REGEX       only functions whose name matches
--again OLD.json   run only the mutants that survived in OLD.json; caught ones are taken over
--list             count the mutants and stop

Tests are collected once; each is run once alone to see which functions of the TABLE it calls and how long it takes; a
mutant then runs, in a fork, the tests that call its function, the quickest first, until one fails. A mutant is put in
place by exchanging the function's __code__, so whoever imported the function has it. Left out: docstrings, annotations
and the arguments of len and isinstance (mutmut's rules), and whatever stands inside a `raise` (texts of errors). Tests
of more than 4 seconds are left out, so the share that is caught is a lower bound. Not for Windows.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VALUES = ("test_oracle_values.py", "test_oracle_enumeration.py", "test_oracle_properties.py", "test_grpo.py")
SAMPLER = ("test_oracle_sampler.py", "test_policy.py", "test_oracle_properties.py", "test_grpo.py")
STATISTICS = ("test_oracle_values.py", "test_inference.py", "test_reports.py")
TASKS = ("test_tasks.py", "test_odd_even.py", "test_rewards.py")
REWARDS = ("test_rewards.py", "test_odd_even.py", "test_tasks.py")
SFT = ("test_sft.py", "test_odd_even.py")
ATTENTION = ("test_model_toy.py", "test_policy.py", "test_oracle_sampler.py", "test_real_models.py")
ALWAYS = ("test_survivors.py",)

# (file, functions, test files): the one thing to change when code moves.
TABLE = [
    ("grpo.py", "group_advantages is_flat kl_penalty loss_denominator policy_loss", VALUES),
    ("algorithms.py", "pairwise_advantages max_at_k", VALUES),
    ("algorithms.py", "correction_weight", (*VALUES, "test_stale.py")),
    ("grpo.py", "surrogate loss_metrics", VALUES),
    ("grpo_run.py", "GRPORun.reason_to_stop", VALUES),
    ("inference.py", "measure_rollout", VALUES),
    ("tasks.py", "take_prompts", VALUES),
    ("rewards.py", "Rewards.__call__", VALUES),
    ("rollouts.py", "Rollout.select join pass_tokens micro_batches", SAMPLER),
    ("rollouts.py", "row_uniforms", SAMPLER),
    ("policy.py", "inverse_cdf", SAMPLER),
    ("attention.py", "attention is_written_out attention_mask additive attention_with spare", ATTENTION),
    ("attention.py", "Shared.regroup Shared.repeat Shared.fold Shared.unfold", ATTENTION),
    ("attention.py", "Cache.extend Cache.share Cache.visible Cache.advance Cache.select", ATTENTION),
    ("attention.py", "Packed.__init__ Packed.__call__ Packed.padded Packed.attend Packed.pad Packed.unpad", ATTENTION),
    ("plan.py", "Plan.table sampler_dtypes copy_bytes activation_bytes", ("test_plan.py",)),
    ("policy.py", "log_distribution", (*SAMPLER, "test_oracle_enumeration.py")),
    ("policy.py", "TokenPolicy.pack", (*SAMPLER, "test_sft.py")),
    (
        "inference.py",
        "pass_at_k wilson bootstrap known_means sampled_results summarize results_table show_number",
        STATISTICS,
    ),
    ("sft.py", "learning_rate_at batches cross_entropy", SFT),
    ("tasks.py", "in_fixed_order arithmetic odd_even Source.load gsm8k_example aimo_example math_example", TASKS),
    ("tasks.py", "alpaca_example smoltldr_example shows_working pose", TASKS),
    (
        "rewards.py",
        "integer_errors extract_answer to_integer to_number to_nearest last_boxed answer_format answer_near",
        REWARDS,
    ),
    ("rewards.py", "answer_format answer_near answer_exact answer_last hard soft", REWARDS),
    ("rewards.py", "nearest_exact distance closeness even_answer", REWARDS),
    ("rewards.py", "even_bonus even_adaptive think_format boxed_format char_length token_length overlap", REWARDS),
    ("rewards.py", "soft_overlong parse_rewards", (*REWARDS, "test_oracle_values.py")),
]
LONGEST_TEST = 4.0  # seconds; slower tests are left out
MOST_SECONDS = 8.0  # of tests for one mutant
TIME_OUT = 40.0


def mutants_of(path: str, wanted: list[str]) -> list[dict]:
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    code = Path(path).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(code))
    visitor = MutationVisitor(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    names = {}
    for node in wrapper.module.body:
        if isinstance(node, cst.FunctionDef):
            names[node] = node.name.value
        elif isinstance(node, cst.ClassDef):
            for method in node.body.body:
                if isinstance(method, cst.FunctionDef):
                    names[method] = f"{node.name.value}.{method.name.value}"
    missing = set(wanted) - set(names.values())
    assert not missing, f"{path} has no {missing}"

    def inside(node, kind) -> set[int]:
        found = set()
        if isinstance(node, kind):
            stack = [node]
            while stack:
                top = stack.pop()
                found.add(id(top))
                stack += top.children
        for child in node.children:
            found |= inside(child, kind)
        return found

    def text(function) -> str:
        return cst.Module([function.with_changes(decorators=[], leading_lines=[])]).code

    raised = {id(node): inside(node, cst.Raise) for node, name in names.items() if name in wanted}
    found, seen = [], set()
    for mutation in visitor.mutations:
        function = mutation.contained_by_top_level_function
        name = names.get(function)
        if name not in wanted or id(mutation.original_node) in raised[id(function)]:
            continue
        before, after = text(function), text(function.deep_replace(mutation.original_node, mutation.mutated_node))
        try:
            tree = ast.dump(ast.parse(after))
            compile(after, path, "exec")
        except SyntaxError:
            continue
        if tree == ast.dump(ast.parse(before)) or (name, tree) in seen:
            continue
        seen.add((name, tree))
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        diff = [line for line in lines if line[:3] not in ("---", "+++") and not line.startswith("@@")]
        key = hashlib.sha256(f"{name}\n{after}".encode()).hexdigest()[:12]
        position = positions[mutation.original_node].start.line
        found.append({"file": path, "function": name, "line": position, "key": key, "diff": diff, "code": after})
    return found


def function_of(path: str, name: str):
    value = importlib.import_module(path.removesuffix(".py"))
    for part in name.split("."):
        value = value.__dict__[part] if isinstance(value, type) else getattr(value, part)
    return getattr(value, "__wrapped__", value)


def put(mutant: dict) -> None:
    """Exchange the code of the mutant's function."""
    target = function_of(mutant["file"], mutant["function"])
    space = dict(target.__globals__)
    tree = compile(mutant["code"], target.__code__.co_filename, "exec")
    exec(tree, space)
    made = space[mutant["function"].rpartition(".")[2]]
    inner = made.__defaults__ and tuple(
        type(f)(f.__code__, target.__globals__) if hasattr(f, "__code__") else f for f in made.__defaults__
    )
    target.__code__, target.__defaults__, target.__kwdefaults__ = made.__code__, inner, made.__kwdefaults__


def forked(work, seconds: float):
    """What `work` returns in a forked process, None if it ended without, or "timeout"."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * 2**30,) * 2)
        try:
            answer = json.dumps(work()).encode()
        except BaseException as error:  # a test that ends the process has failed
            answer = json.dumps({"failed": f"{type(error).__name__}"}).encode()
        os.write(write, answer)
        os._exit(0)
    os.close(write)
    data, late, end = b"", False, time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            late = True
            break
        part = os.read(read, 65536)
        if not part:
            break
        data += part
    os.close(read)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # and what it may have started
    os.waitpid(pid, 0)
    return "timeout" if late else json.loads(data) if data else None


class Runner:
    """A pytest plugin whose test loop is the measurement."""

    def __init__(self, options, mutants, files):
        self.options, self.mutants, self.files = options, mutants, files

    def pytest_runtestloop(self, session):
        import numpy
        import torch

        numpy.random.default_rng(0)  # what these import at their first call would cost each process a second
        torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
        self.base = session.config._tmp_path_factory.getbasetemp()
        self.config = session.config
        profile = self.profile(session.items)
        results = {}
        if self.options.again:
            for old in json.loads(Path(self.options.again).read_text()):
                if old["status"] != "survived":
                    results[old["key"]] = old
        start = time.monotonic()
        for number, mutant in enumerate(self.mutants, 1):
            if mutant["key"] not in results:
                results[mutant["key"]] = self.measure(mutant, profile)
                result = results[mutant["key"]]
                if result["status"] == "survived":
                    print(f"{mutant['function']}:{mutant['line']}", *mutant["diff"], sep="\n    ", flush=True)
                if number % 50 == 0:
                    print(f"[{number}/{len(self.mutants)}, {time.monotonic() - start:.0f} s]", flush=True)
        Path(self.options.out).write_text(json.dumps([results[m["key"]] for m in self.mutants], indent=1))
        return True

    def run_items(self, items) -> dict:
        from _pytest.runner import runtestprotocol

        for item, following in zip(items, [*items[1:], None], strict=False):
            for report in runtestprotocol(item, nextitem=following, log=False):
                if report.failed:
                    return {"failed": item.nodeid, "stage": report.when}
                if report.skipped:
                    break
        return {"failed": None}

    def profile(self, items) -> dict[str, list]:
        """For each function the (seconds, item) of the tests that call it, the quickest first."""
        codes = {}
        for path, names, _ in TABLE:
            codes |= {function_of(path, name).__code__: name for name in names.split()}
        calls = {name: [] for name in codes.values()}
        wanted = {mutant["function"] for mutant in self.mutants}
        start, slow, failed = time.monotonic(), [], []
        for item in items:

            def work(item=item):
                touched = set()

                def trace(frame, event, argument):
                    name = codes.get(frame.f_code)
                    if name:
                        touched.add(name)

                begin = time.monotonic()
                threading.settrace(trace)
                sys.settrace(trace)
                result = self.run_items([item])
                sys.settrace(None)
                return result | {"seconds": time.monotonic() - begin, "touched": sorted(touched)}

            found = forked(work, 60.0)
            self.clean()
            if not isinstance(found, dict) or found["failed"]:
                failed.append(item.nodeid)
            elif found["seconds"] > LONGEST_TEST:
                slow.append(item.nodeid)
            else:
                for name in found["touched"]:
                    if name in calls:
                        calls[name].append((found["seconds"], item))
        for pairs in calls.values():
            pairs.sort(key=lambda pair: pair[0])
        print(f"{len(items)} tests profiled in {time.monotonic() - start:.0f} s; slow {len(slow)}; failed {failed}")
        for name in sorted(wanted & set(calls)):
            print(f"  {name}: {len(calls[name])} tests, {sum(s for s, _ in calls[name]):.1f} s")
        sys.stdout.flush()
        return calls

    def clean(self) -> None:
        for path in self.base.iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def measure(self, mutant: dict, profile) -> dict:
        chosen, total = [], 0.0
        for seconds, item in profile[mutant["function"]]:
            if item.path.name in self.files[mutant["function"]] and total + seconds <= self.options.seconds:
                chosen.append(item)
                total += seconds

        def work():
            put(mutant)
            return self.run_items(chosen)

        begin = time.monotonic()
        found = forked(work, TIME_OUT)
        self.clean()
        status = "survived"
        if found in (None, "timeout") or found["failed"]:
            status = "timeout" if found == "timeout" else "caught"
        by = found["failed"] if isinstance(found, dict) else found
        shown = {key: value for key, value in mutant.items() if key != "code"}
        return shown | {"status": status, "by": by, "tests": len(chosen), "seconds": round(time.monotonic() - begin, 2)}


def table(results: list[dict]) -> str:
    lines, total = [], [0, 0]
    for path, names, _ in TABLE:
        for name in names.split():
            rows = [r for r in results if (r["file"], r["function"]) == (path, name)]
            if rows:
                caught = sum(r["status"] != "survived" for r in rows)
                total = [total[0] + len(rows), total[1] + caught]
                lines.append(f"{path:13} {name:22} {len(rows):4} {caught:4} {caught / len(rows):6.1%}")
    return "\n".join([*lines, f"{'all':36} {total[0]:4} {total[1]:4} {total[1] / max(1, total[0]):6.1%}"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="mutants.json")
    parser.add_argument("--only", default="")
    parser.add_argument("--again")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    mutants, files = [], {}
    for path, names, tests in TABLE:
        chosen = [name for name in names.split() if re.search(options.only, name)]
        mutants += mutants_of(path, chosen) if chosen else []
        files |= {name: {*tests, *ALWAYS} for name in chosen}
    if options.list:
        print(table([m | {"status": "survived"} for m in mutants]))
        return
    import pytest

    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    used = sorted({f"tests/{name}" for names in files.values() for name in names if Path("tests", name).exists()})
    runner = Runner(options, mutants, files)
    status = pytest.main(["-q", "-s", "--tb=line", "-p", "no:cacheprovider", *used], plugins=[runner])
    results = json.loads(Path(options.out).read_text())
    print(f"\nfile          function            mutants caught   (pytest {status})\n{table(results)}")


if __name__ == "__main__":
    main()
