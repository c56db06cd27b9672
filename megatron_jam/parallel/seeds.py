"""Random numbers on the device: a function of (seed, step) and the rank's place, never a state."""

import hashlib

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_jam.parallel.world import World


def seed_step(world: World, *, seed: int, step: int) -> None:
    """Seed what this rank draws in optimizer step `step`, so that a resumed run draws the same.

    Tensor-parallel ranks draw alike, but unlike ones from Megatron's tracker, which sequence
    parallelism uses; replicas, ranks that share a sequence, and pipeline stages always differ.
    """
    place = f"{seed}|{step}|{world.replicas.rank}|{world.pipeline.rank}"
    digest = hashlib.sha256(place.encode()).digest()
    model_parallel_cuda_manual_seed(
        int.from_bytes(digest[:4], "little") >> 1,
        tp_rank=world.tensor.rank,
        ep_rank=0,
        etp_rank=0,
        force_reset_rng=True,
    )
