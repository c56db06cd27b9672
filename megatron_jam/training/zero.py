"""DeepSpeed's ZeRO in place of Megatron's wrapper and optimizer: data parallel alone, for few GPUs.

Model, data, losses and checkpoints are those of the other engine. DeepSpeed takes the mean of
gradients over ranks; a rank's loss is scaled so that this is the sum over the global batch divided
by its counted tokens. Tested with DeepSpeed 0.19.8; what it has no public name for stands in
`_watch_norms`, `_flat_masters` and `_put`.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_jam.config.run import RunConfig
from megatron_jam.models.jam import JamModel
from megatron_jam.models.parameters import parameter_table
from megatron_jam.models.sharding import Holder, holders, unpack
from megatron_jam.parallel.device import synchronize
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.training.engine import Decodable
from megatron_jam.training.losses import Losses
from megatron_jam.training.moments import KINDS
from megatron_jam.training.optimizer import set_learning_rate
from megatron_jam.training.state import STATE, sharded
from megatron_jam.training.step import Batch, ForwardBackward, Judge, StepResult
from megatron_jam.training.zero_setup import deepspeed_settings, import_deepspeed, weight_groups
from megatron_jam.weights.load import whole_weights

MOMENTS = KINDS[1:]


class ZeroEngine:
    """DeepSpeed's engine around the model; see `engine.Engine`.

    It is made when it is first needed: until then the model is whole on every rank, and pre-flight
    and a checkpoint's weights need not know of it.
    """

    def __init__(
        self,
        chunks: Sequence[JamModel],
        config: RunConfig,
        world: World,
        vocabulary: JointVocabulary,
    ) -> None:
        """Train the only one of `chunks`, which has its weights and is frozen as it is to stay.

        Raises:
            UsageError: DeepSpeed is missing, or a learning-rate factor is for a part that the model
                lacks.
        """
        self.chunks, self._config, self._world = chunks, config, world
        (self._model,) = chunks
        self._package = import_deepspeed(world.device)
        self._groups = weight_groups(self._model, config.optimizer)
        self.forward = _Forward(self, world, vocabulary, config)
        self._norms: list[Tensor] = []
        self._norm, self._refused = math.nan, ""

    @cached_property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine."""
        settings = self._config.optimizer
        optimizer = torch.optim.AdamW(
            self._groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )
        engine, *_ = self._package.initialize(
            model=self._model,
            optimizer=optimizer,
            config=deepspeed_settings(self._config, self._world),
            dist_init_required=False,
        )
        zero = engine.optimizer
        for flat in self._flat_masters(zero):
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if self._config.deepspeed.stage == 2:
            # By itself it would look for the state of all groups when the first has made a step.
            zero._lazy_init_hp_params_optimizer_state()
        self._note_norms(zero)
        return engine

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, judge: Judge
    ) -> StepResult:
        """See Engine."""
        start = time.perf_counter()
        losses = self.forward(micro_batches)
        computed = time.perf_counter()
        set_learning_rate(self.deepspeed.optimizer, learning_rate)
        self._watch_norms(losses.mean, judge)
        self.deepspeed.step()
        synchronize(self._world.device)
        seconds = {
            "forward_backward": computed - start,
            "optimizer": time.perf_counter() - computed,
        }
        return StepResult(
            losses=losses,
            grad_norm=self._norm,
            part_norms=self._part_norms(),
            learning_rate=learning_rate,
            seconds=seconds,
            skipped=self._refused,
        )

    def _note_norms(self, zero: Any) -> None:
        """Have DeepSpeed leave in `_norms` what it measures of each group of weights, or with stage
        3 of each piece of one."""
        offload = self._config.deepspeed.offload_optimizer
        kind = "complete_grad_norm_calculation_for_cpu_offload" if offload else ""
        name = kind or "get_grad_norm_direct"
        measure = getattr(type(zero), name)

        def noted(*args: Any) -> Tensor:
            found = measure(zero, *args)
            self._norms.append(found)
            return found

        setattr(zero, name, noted)

    def _watch_norms(self, loss: float, judge: Judge) -> None:
        """Judge the next step when DeepSpeed measures its gradient: it skips steps whose norm is
        not finite, and so is told that of steps that are refused."""
        zero = self.deepspeed.optimizer
        zero.check_grad_overflow = True  # so that it looks in fp32 as well
        name = "_get_norm_groups" if self._config.deepspeed.stage == 3 else "scaled_global_norm"
        measure = getattr(type(zero), name)

        def watched() -> Any:
            self._norms.clear()
            found = measure(zero)
            norms = torch.stack(self._norms)
            # -1 stands for what is not finite.
            self._norm = float(norms.norm()) if bool((norms >= 0).all()) else math.inf
            messages = judge.message(loss)
            dist.all_reduce(messages)
            self._refused = judge(loss, self._norm, messages)
            if not self._refused:
                return found
            refusal = torch.full_like(norms[0], torch.inf)
            return [refusal] if isinstance(found, list) else refusal

        setattr(zero, name, watched)

    def _part_norms(self) -> dict[str, float]:
        """Norms of the last gradient's parts that learn, out of those of its groups; none if one is
        not finite."""
        if not math.isfinite(self._norm):
            return {}
        zero = self.deepspeed.optimizer
        pieces = getattr(zero, "sub_group_to_group_id", range(len(self._norms)))
        squares = dict.fromkeys(self._model.model_config.parts, 0.0)
        for number, norm in enumerate(torch.stack(self._norms).tolist()):
            squares[self._groups[pieces[number]]["part"]] += norm**2
        return {part: math.sqrt(value) for part, value in squares.items() if value}

    def finish_weights(self) -> None:
        """DeepSpeed's step ends when the weights are there."""

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """See Engine. Each weight's state is gathered by all ranks and written by one of them."""
        state: dict[str, Any] = {"model": {}, "moments": {}}
        for number, holder in enumerate(holders(self._model)):
            owner = number % self._world.size
            if is_loading:
                found = _empty_state(holder) if owner == self._world.rank else {}
            else:
                found = self._whole_state(holder)
            if owner != self._world.rank:
                continue
            weight = found.pop("weight")
            state["model"][holder.key] = self._sharded(holder, weight, "")
            for kind, value in found.items():
                prefix = f"{STATE}.{kind}."
                state["moments"][prefix + holder.key] = self._sharded(holder, value, prefix)
        state["optimizer"] = {"optimizer": {"param_groups": self._described_groups()}}
        state["optimizer"]["param_state_sharding_type"] = "fully_reshardable"
        return state

    def _sharded(self, holder: Holder, value: Tensor, prefix: str) -> Any:
        held = replace(holder, parameter=value, key=prefix + holder.key)
        return sharded(held, self._world, replica=0)

    def _whole_state(self, holder: Holder) -> dict[str, Tensor]:
        """A weight, and if it learns its fp32 copy and moments, on the host of every rank."""
        utils, weight = self._package.utils, holder.parameter
        if not weight.requires_grad:
            return {"weight": self._whole(weight).cpu()}
        _ = self.deepspeed
        found = {"param": utils.safe_get_full_fp32_param(weight)}
        for kind in MOMENTS:
            found[kind] = utils.safe_get_full_optimizer_state(weight, kind)
        found = {kind: value.view(_shape(weight)).cpu() for kind, value in found.items()}
        return {"weight": found["param"].to(weight.dtype), **found}

    def _described_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, as Megatron's writes and looks for them."""
        settings = self._config.optimizer
        states = self.deepspeed.optimizer.optimizer.state if "deepspeed" in self.__dict__ else {}
        steps = max((int(each["step"]) for each in states.values()), default=0)
        kinds = {(group["weight_decay"], group["lr_mult"]): group for group in self._groups}
        return [
            {
                "wd_mult": 1.0 if group["weight_decay"] else 0.0,
                "lr_mult": group["lr_mult"],
                "is_expert_parallel": False,
                "is_decoupled_lr": False,
                "lr": settings.learning_rate * group["lr_mult"],
                "weight_decay": group["weight_decay"],
                "betas": (settings.beta1, settings.beta2),
                "eps": settings.epsilon,
                "step": steps,
            }
            for group in kinds.values()
        ]

    @torch.no_grad()
    def take_state(self, loaded: Mapping[str, Any]) -> None:
        """See Engine."""
        owned = list(enumerate(holders(self._model)))
        for number, holder in owned:
            value = loaded.get("model", {}).get(holder.key)
            holder.parameter.copy_(self._from_owner(number, value, holder))
        for state in self.deepspeed.optimizer.optimizer.state.values():
            state["step"].fill_(loaded["optimizer"]["optimizer"]["param_groups"][0]["step"])
        for number, holder in owned:
            for kind in KINDS if holder.parameter.requires_grad else ():
                value = loaded.get("moments", {}).get(f"{STATE}.{kind}.{holder.key}")
                self._put(holder.parameter, kind, self._from_owner(number, value, holder))

    def _from_owner(self, number: int, value: Tensor | None, holder: Holder) -> Tensor:
        """What one rank has loaded of a weight, in fp32 unless that is its model's dtype."""
        owner = number % self._world.size
        dtype = torch.promote_types(holder.parameter.dtype, torch.float32)
        if value is None:
            value = torch.empty(_shape(holder.parameter), dtype=dtype)
        moved = value.detach().to(self._world.device, dtype).contiguous()
        dist.broadcast(moved, owner)
        return moved

    def _flat_masters(self, zero: Any) -> list[Tensor]:
        """This rank's stretches of fp32 weights, which the optimizer updates."""
        is_third = self._config.deepspeed.stage == 3
        return (
            zero.fp32_partitioned_groups_flat if is_third else zero.single_partition_of_fp32_groups
        )

    def _put(self, weight: nn.Parameter, kind: str, value: Tensor) -> None:
        """Set this rank's part of a weight's fp32 copy or moment."""
        key = None if kind == "param" else kind
        if self._config.deepspeed.stage == 2:
            weight.set_full_hp_param(value, key)  # type: ignore[operator]
            return
        local, _ = self.deepspeed.optimizer._get_fp32_opt_state_partition(weight, False, key)
        size, count = local.numel(), self._world.size
        # The last rank's part is filled up.
        parts = F.pad(value.flatten(), (0, size * count - value.numel())).view(count, size)
        local.copy_(parts[self._world.rank])

    def whole_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """See Engine; with stage 3 one parameter is gathered at a time."""
        if self._config.deepspeed.stage == 2:
            yield from whole_weights(self.chunks, self._world)
            return
        held = {part.name: each for each in holders(self._model) for part in each.parts}
        gathered: tuple[str, dict[str, Tensor]] = ("", {})
        for entry in parameter_table(self._model.model_config):
            holder = held[entry.name]
            if gathered[0] != holder.key:
                gathered = holder.key, unpack(self._whole(holder.parameter), holder.parts)
            yield entry.name, gathered[1][entry.name] if self._world.rank == 0 else None

    def for_decoding(self) -> Decodable:
        """See Engine; with stage 3 each weight is gathered when a token needs it."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            # Weights that are gathered in inference mode could not be trained.
            with torch.inference_mode(False), torch.no_grad():
                return self.deepspeed(*args, **kwargs)

        return Decodable(self.chunks, [call], self._world)

    @torch.no_grad()
    def _whole(self, weight: nn.Parameter) -> Tensor:
        """A copy of a weight; gathered, where the ranks share it."""
        with self._package.zero.GatheredParameters([weight]):
            return weight.detach().clone()


class _Forward(ForwardBackward):
    """Runs micro-batches through DeepSpeed's engine, which keeps the gradients until the step."""

    def __init__(
        self, engine: ZeroEngine, world: World, vocabulary: JointVocabulary, config: RunConfig
    ) -> None:
        told = {"loss": config.loss, "num_sets": len(config.data.sets)}
        super().__init__(engine.chunks, world, vocabulary, **told)
        self._engine = engine

    def __call__(self, micro_batches: Sequence[Batch], *, forward_only: bool = False) -> Losses:
        engine = self._engine.deepspeed
        engine.train(not forward_only)
        scale = 0.0 if forward_only else self._scale(micro_batches)
        self._reported = []
        for each in micro_batches:
            if self._reported and not forward_only:
                engine.step()  # counts the micro-batch before this one
            with torch.set_grad_enabled(not forward_only):
                output, loss = self._forward(iter([each]), engine)
                total, _, report = loss(output)
            if not forward_only:
                engine.backward(total * scale, scale_wrt_gas=False)
            self._reported.append(report)
        return self._collect(self._reported)

    def _scale(self, micro_batches: Sequence[Batch]) -> float:
        """Ranks over counted tokens of the global batch: DeepSpeed divides by the former."""
        counted = sum(each["loss_mask"].sum(dtype=torch.float64) for each in micro_batches)
        counted = torch.as_tensor(counted, device=self.device)
        dist.all_reduce(counted)
        return self._world.size / max(1.0, float(counted))


def _empty_state(holder: Holder) -> dict[str, Tensor]:
    """What `_whole_state` has, to be loaded."""
    shape, dtype = _shape(holder.parameter), holder.parameter.dtype
    found = {"weight": torch.empty(shape, dtype=dtype)}
    if holder.parameter.requires_grad:
        found |= {kind: torch.empty(shape) for kind in KINDS}
    return found


def _shape(weight: nn.Parameter) -> torch.Size:
    """A weight's own shape, also where the ranks share it."""
    return getattr(weight, "ds_shape", weight.shape)
