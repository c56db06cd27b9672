"""The loss of 2,048 tokens over 65,536 ids with its gradients: peak memory and time over those of
torch's linear and cross-entropy, and over Megatron-Core's cross-entropy; one thread, fp32.

Peak memory is the growth of a fresh process's largest resident set.
"""

import multiprocessing
import resource
from collections.abc import Callable

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import Run, row, speed_over
from megatron_jam.config.cli import run_command
from megatron_jam.config.errors import UsageError
from megatron_jam.config.parallel import ParallelConfig
from megatron_jam.models.loss import Reading, linear_cross_entropy
from megatron_jam.parallel.world import World, start_world, stop_world

TOKENS, WIDTH, VOCABULARY = 2_048, 512, 65_536
PEERS = {"torch": "torch's linear and cross_entropy", "megatron": "Megatron-Core's cross-entropy"}


def main(*, pairs: int = 7, json: bool = False) -> None:
    """Print ratios, peer over this project: above 1 it takes less memory or time.

    Args:
        pairs: how often each is run.
        json: one line of JSON a row (name, ratio, spread) in place of text.
    """
    if pairs < 1:
        raise UsageError(f"pairs is {pairs}; it must be at least 1")
    for peer, name in PEERS.items():
        found = [peak_bytes(peer) / peak_bytes("ours") for _ in range(pairs)]
        row(f"peak memory of {name} over ours", found).print(as_json=json)
    torch.set_num_threads(1)
    world = start_world(ParallelConfig())
    runs = {kind: KINDS[kind](world) for kind in KINDS}
    losses = [float(run()) for run in runs.values()]  # type: ignore[arg-type]
    assert max(losses) - min(losses) < 1e-4, losses
    for peer, name in PEERS.items():
        speed_over(f"speed over {name}", runs["ours"], runs[peer], pairs=pairs).print(as_json=json)
    stop_world()


def peak_bytes(kind: str) -> int:
    """Growth of the resident set of a fresh process that runs `kind` once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (kind,))


def _grow(kind: str) -> int:
    torch.set_num_threads(1)
    run = KINDS[kind](start_world(ParallelConfig()))
    before = psutil.Process().memory_info().rss
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def material() -> tuple[Tensor, Tensor, Tensor]:
    """States [T, d] and rows [V, d] that want gradients, labels [T]."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    rows = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 20).requires_grad_()
    return states, rows, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def ours(world: World) -> Run:
    """Sum of the losses in pieces."""
    states, rows, labels = material()
    readings = [Reading(start=0, stop=VOCABULARY, hidden=0, table=0)]
    settings = {"num_real": VOCABULARY, "group": world.groups.tp}

    def run() -> Tensor:
        mask = torch.ones(TOKENS)
        total, _ = linear_cross_entropy([states], [rows], readings, labels, mask, **settings)
        torch.autograd.grad(total, (states, rows))
        return total.detach() / TOKENS

    return run


def naive(_: World) -> Run:
    """All logits at once, torch's loss."""
    states, rows, labels = material()

    def run() -> Tensor:
        total = F.cross_entropy(F.linear(states, rows), labels)
        torch.autograd.grad(total, (states, rows))
        return total.detach()

    return run


def megatron(world: World) -> Run:
    """All logits at once, Megatron-Core's loss."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    states, rows, labels = material()

    def run() -> Tensor:
        total = vocab_parallel_cross_entropy(F.linear(states, rows), labels).mean()
        torch.autograd.grad(total, (states, rows))
        return total.detach()

    return run


KINDS: dict[str, Callable[[World], Run]] = {"ours": ours, "torch": naive, "megatron": megatron}


if __name__ == "__main__":
    run_command(main)
