"""Training checkpoints: Megatron's dist_checkpointing, staged and then committed by a rename.

    OUTPUT/checkpoints/step-00000100/   Megatron's files, and jam.json: what the checkpoint is of

Every tensor has one global name, so any TP x PP x DP reads what another one wrote. Megatron's files
hold pickles: a checkpoint is trusted input, unlike a weights folder.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import replace_folder, write_text_atomically
from megatron_jam.config.log import logger
from megatron_jam.models.jam import JamModel
from megatron_jam.models.sharding import Holder, holders
from megatron_jam.parallel.world import World

MARKER = "jam.json"
_NAME = re.compile(r"step-(\d{8})")
# The only layout of the optimizer's state that any TP x PP x DP can load.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        chunks: Sequence[JamModel],
        optimizer: MegatronOptimizer,
        world: World,
        *,
        identity: Mapping[str, Any],
        keep: int,
    ) -> None:
        """Keep the newest `keep` checkpoints in `folder`.

        Args:
            folder: where they are.
            chunks: this rank's model.
            optimizer: its optimizer.
            world: the ranks.
            identity: settings that a run must not change, as plain JSON values.
            keep: how many are kept.
        """
        self._folder, self._keep = Path(folder), keep
        self._chunks, self._optimizer, self._world = chunks, optimizer, world
        self._identity = dict(identity)

    def save(self, step: int) -> Path:
        """Save the state after `step` optimizer steps; all ranks take part."""
        final = self._folder / f"step-{step:08d}"
        part = self._folder / f".{final.name}.part"
        if self._world.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self._state(is_loading=False), str(part))
        dist.barrier()
        if self._world.rank == 0:
            self._commit(part, final, step)
        dist.barrier()
        return final

    def load_latest(self) -> int:
        """Load the newest checkpoint into the model and optimizer.

        Returns:
            Optimizer steps that it had made; 0 if there is no checkpoint.

        Raises:
            UsageError: if the run's identity differs; the message names the setting.
        """
        found = complete_checkpoints(self._folder)
        if not found:
            return 0
        path = found[-1]
        marker = json.loads((path / MARKER).read_text())
        for name, value in self._identity.items():
            if marker["identity"].get(name) != value:
                raise UsageError(
                    f"{path} was made with another `{name}`: set it back to go on with that run, or"
                    " choose another output to begin a new one"
                )
        loaded = dist_checkpointing.load(self._state(is_loading=True), str(path))
        with torch.no_grad():
            for chunk in self._chunks:
                for holder in holders(chunk):
                    holder.parameter.copy_(loaded["model"][_local_key(holder)])
        self._optimizer.load_state_dict(loaded["optimizer"])
        logger.info("resumed from %s", path)
        return int(marker["step"])

    def _state(self, *, is_loading: bool) -> dict:
        model = {}
        for chunk in self._chunks:
            for holder in holders(chunk):
                model[_local_key(holder)] = _sharded(holder, self._world)
        optimizer = self._optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=_RESHARDABLE
        )
        return {"model": model, "optimizer": optimizer}

    def _commit(self, part: Path, final: Path, step: int) -> None:
        marker = {"step": step, "identity": self._identity}
        write_text_atomically(part / MARKER, json.dumps(marker, indent=2) + "\n")
        if final.exists() and not (final / MARKER).is_file():
            shutil.rmtree(final)  # half a checkpoint: it never counted
        replace_folder(part, final, marker=MARKER)
        logger.info("saved %s", final)
        for old in complete_checkpoints(self._folder)[: -self._keep]:
            shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    names = sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name))
    return [path for path in names if (path / MARKER).is_file()]


def _local_key(holder: Holder) -> str:
    return f"{holder.key} (copy)" if holder.is_copy else holder.key


def _sharded(holder: Holder, world: World) -> ShardedTensor | ShardedTensorFactory:
    """A parameter's place in the whole model; the first stage's copy of a tied table is saved."""
    groups = {"tp_group": world.groups.tp, "dp_cp_group": world.groups.dp_cp}
    copy = int(holder.is_copy)
    if holder.split is None:
        replica = (copy, world.tensor.rank, world.replicas.rank)
        return make_sharded_tensor_for_checkpoint(
            holder.parameter, holder.key, replica_id=replica, **groups
        )
    sharded = make_tp_sharded_tensor_for_checkpoint(
        holder.parameter,
        holder.key,
        holder.split,
        replica_id=(copy, 0, world.replicas.rank),
        # Another TP pads the vocabulary differently.
        allow_shape_mismatch=holder.parts[0].is_vocabulary,
        **groups,
    )
    if len(holder.parts) == 1 or holder.parts[0].unit:
        return sharded
    # A rank holds its rows of the gate, then its rows of fc1: two places in the whole tensor.
    return apply_swiglu_sharded_factory(sharded, ())
