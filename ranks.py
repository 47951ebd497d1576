"""Several processes, as torchrun starts them: which one this is, its share of the work, sums and what all must know.

Each rank samples and scores whole groups of its own; a sum over all ranks makes of their gradients that of one process.
Each holds the whole model or, after `shard`, its part of it. Alone, every function here gives back what it was given.
"""

import atexit
import contextlib
import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # the number of its GPU
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
FIRST = RANK == 0  # writes and prints
if WORLD > 1:  # a second to import
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, distribute_tensor


def launch() -> str:
    """What tells this launch by torchrun, restarts included, from every other."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    here = [os.getppid()] if os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD) else []  # on one machine
    return " ".join(map(str, [*(os.environ.get(name, "") for name in names), *here]))


def begin(seconds: float = 1800.0) -> None:
    """Meet the other ranks, if there are any; one that is silent for so many seconds ends the others."""
    if WORLD > 1 and not dist.is_initialized():
        backend, meet = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # which after a restart still knows the dead
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), WORLD, is_master=False)
            meet = {"store": dist.PrefixStore(f"attempt {RESTARTS}", store), "rank": RANK, "world_size": WORLD}
        dist.init_process_group(backend, timeout=timedelta(0, seconds), **meet)
        atexit.register(time.sleep, 0.2)  # while gloo's threads drop their last tensors: without Python they abort
        if not FIRST:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def share(count: int) -> tuple[int, int]:
    """Where this rank's share of `count` things in a row begins and ends; shares differ by one at most."""
    return count * RANK // WORLD, count * (RANK + 1) // WORLD


def own(things):
    """This rank's share of things in a row: a list's, or a tensor's along its first dimension."""
    start, end = share(len(things))
    return things[start:end]


@contextlib.contextmanager
def talking(only: bool = True):
    """Turn what a dead or silent rank does to the others into an error that says so; not `only`: what looks like it."""
    try:
        yield
    except RuntimeError as error:
        if not (only or isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        what = "another process of this run has ended or is silent; the last state stays, --resume goes on from there"
        raise ConnectionResetError(errno.ECONNRESET, what, f"rank {RANK}") from error


def gather(value) -> list:
    """The value of every rank, in their order."""
    values = [value] * WORLD
    if WORLD > 1:
        with talking():
            dist.all_gather_object(values, value)
    return values


def every(function: Callable) -> list:
    """What the function gives on every rank, in their order; what it raises on one is raised on all."""
    if WORLD == 1:
        return [function()]
    try:
        told = (function(), None)
    except Exception as error:  # the others must know, or they would wait for this one
        told = (None, error)
    values, errors = zip(*gather(told), strict=True)
    for error in filter(None, errors):
        raise error
    return list(values)


def first(function: Callable, *arguments):
    """What the function gives, or raises, on the first rank, which alone calls it."""
    return every(lambda: function(*arguments) if FIRST else None)[0]


def total(values: dict[str, float]) -> dict[str, float]:
    """The sums over all ranks, name by name."""
    sums = Counter()
    for each in gather(values):
        sums.update(each)
    return dict(sums)


def largest(values: dict[str, float]) -> dict[str, float]:
    """The largest of all ranks, name by name."""
    told = gather(values)
    return {name: max(each[name] for each in told) for name in values}


def add_gradients(weights: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of every rank, each that of its own rows over the denominator of all rows."""
    if WORLD == 1 or is_sharded(weights[0]):  # whose backward pass has done it
        return
    used = [any(ranks) for ranks in zip(*gather([weight.grad is not None for weight in weights]), strict=True)]
    weights = [weight for weight, somewhere in zip(weights, used, strict=True) if somewhere]
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    with talking():
        for work in [dist.all_reduce(weight.grad, async_op=True) for weight in weights]:
            work.wait()


def is_sharded(what: nn.Module | torch.Tensor) -> bool:
    """Whether a model or a tensor is split among the ranks."""
    return WORLD > 1 and isinstance(what, (FSDPModule, DTensor))


def shard(model: nn.Module) -> None:
    """Split a model's weights, and so their gradients and moments, among the ranks (FSDP2), in place.

    A pass gathers the weights of a block while it computes that block, and all ranks must make it together. So they
    must where they call `state_dict`, which still gives whole tensors, as `load_state_dict` takes them.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len, default=())
    for part in (*blocks, model):
        # What is outside the blocks stays whole until the backward pass ends: the logits are made outside `forward`.
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not model)
        part.set_gradient_divide_factor(1.0)  # a sum, since each loss is over the denominator of all rows
        part.set_force_sum_reduction_for_comms(True)  # else of products with 1, which gloo does not know
    if hasattr(model, "packed"):
        register_fsdp_forward_method(model, "packed")
    for module in model.modules():
        module.register_state_dict_post_hook(gather_weights)
        module.register_load_state_dict_pre_hook(split_weights)


def gather_weights(module: nn.Module, weights: dict, *_) -> None:
    """Make the tensors of a `state_dict` whole."""
    weights |= {name: full(weight) for name, weight in weights.items()}


def split_weights(module: nn.Module, weights: dict, prefix: str, *_) -> None:
    """Split the tensors that a `load_state_dict` takes."""
    for name, weight in module.named_parameters(recurse=False):
        if prefix + name in weights:
            weights[prefix + name] = split(weights[prefix + name], weight)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, whole on every rank."""
    with talking():
        return tensor.full_tensor() if is_sharded(tensor) else tensor


def split(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor this rank's part, a copy, if `like`, of the same shape, is split."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


@contextlib.contextmanager
def whole(model: nn.Module):
    """Hold all weights of a sharded model on every rank, so that passes without gradient need not keep step."""
    parts = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        with talking():
            part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
        if parts:
            model.reset_iter_state()  # forget the order of these passes, which differs from rank to rank


def all_leave(seconds: float = 10.0) -> bool:
    """Whether every rank is about to end, so that they can save together what each has a part of."""
    with contextlib.suppress(RuntimeError):
        return bool(dist.new_group(backend="gloo", timeout=timedelta(0, seconds)))  # which all must make
    return False


def keep_step(model: nn.Module, passes: int, again: Callable[[], torch.Tensor]) -> None:
    """Make up for having fewer passes through a sharded model than another rank, by some whose gradient is 0."""
    if is_sharded(model):
        for _ in range(passes, max(gather(passes))):
            (0.0 * again().sum()).backward()
