"""Checkpoints as metaseq writes them, from tensors of ours: its names, parts and FSDP shards.

Written after the description of its format, apart from the code that reads them.
"""

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_jam.config.model import ModelConfig

NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn.fc1": "fc1",
    "ffn.fc2": "fc2",
}
GATED = {**NAMES, "ffn.gate": "fc1", "ffn.fc1": "activation_fn.gate"}
TOWERS = {"main": "", "image": "_cm3", "text": "_llm"}


def state_dict(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, padded: int = 0
) -> dict[str, Tensor]:
    """A whole model under metaseq's keys; the token table gets `padded` more rows."""
    tokens = tensors["embedding.tokens.weight"]
    tokens = torch.cat([tokens, torch.full((padded, tokens.shape[1]), 7.0).to(tokens.dtype)])
    pair = "_cm3" if config.is_pair else ""
    found = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_tokens.weight": tokens,
        f"decoder.embed_positions{pair}.weight": tensors["embedding.positions.weight"],
    }
    for name, tensor in tensors.items():
        kind, number, tower, *rest = (*name.split("."), "", "")
        if kind not in ("layers", "bridges"):
            continue
        stem, what = ".".join(part for part in rest if part).rsplit(".", 1)
        names = GATED if config.towers[tower].gated else NAMES
        if kind == "layers":
            room = f"decoder.layers{TOWERS[tower]}.{number}"
        else:
            room = f"decoder.x_attn_layers{TOWERS[tower]}.{int(number) // config.bridges.every}"
            if stem.startswith("attention.") and what == "bias":
                continue  # the authors' bridges have none
        if stem in ("attention.q", "attention.k", "attention.v"):
            found[f"{room}.self_attn.{stem[-1]}_proj.{what}"] = tensor
        else:
            found[f"{room}.{names[stem]}.{what}"] = tensor
    for name in ("norm.weight", "norm.bias"):
        if f"head.{name}" in tensors:
            found[f"decoder.layer_{name}"] = tensors[f"head.{name}"]
    if "head.projection.weight" in tensors:
        found["decoder.feature_projection.weight"] = tensors["head.projection.weight"]
    output = tensors.get("head.output.weight")
    found["decoder.output_projection.weight"] = tokens if output is None else output
    return found


def split(whole: Mapping[str, Tensor], parts: int, *, packed: bool = True) -> list[dict]:
    """Tensor-parallel parts; keys, values and queries of the towers stacked, if `packed`."""
    found: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for key, tensor in whole.items():
        stem, what = key.rsplit(".", 1)
        rows = stem.endswith(
            ("embed_tokens", "fc1", "k_proj", "v_proj", "q_proj", "gate", "output_projection")
        )
        columns = stem.endswith(("out_proj", "fc2")) and what == "weight"
        for number, part in enumerate(found):
            if rows or columns:
                part[key] = tensor.chunk(parts, dim=0 if rows else 1)[number]
            else:
                part[key] = tensor
    if packed:
        for part in found:
            for key in [k for k in part if ".k_proj." in k and "x_attn" not in k]:
                three = [part.pop(key.replace("k_proj", f"{each}_proj")) for each in "kvq"]
                part[key.replace("k_proj", "qkv_proj")] = torch.cat(three)
    return found


def shard(part: Mapping[str, Tensor], shards: int) -> list[dict[str, Any]]:
    """FSDP shards of a part, `model` and `shard_metadata` of each: a flat vector for each layer and
    one for all else, cut into chunks, the last of them padded to the others' length."""
    rooms: dict[str, dict[str, Tensor]] = {"": {}}
    for key, tensor in part.items():
        if key in ("decoder.version", "decoder.output_projection.weight"):
            continue
        words = key.split(".")
        room = ".".join(words[:3]) if "layers" in words[1] else ""
        name = key[len(room) + 1 :] if room else key
        rooms.setdefault(room, {})[name] = tensor
    files: list[dict[str, Any]] = []
    for rank in range(shards):
        model: dict[str, Tensor] = OrderedDict()
        entries = []
        for room, held in rooms.items():
            flat = torch.cat([tensor.reshape(-1) for tensor in held.values()])
            chunks = list(flat.chunk(shards))
            chunks += [flat[:0]] * (shards - len(chunks))
            padding = len(chunks[0]) - len(chunks[rank])
            padded = torch.cat([chunks[rank], chunks[rank].new_full((padding,), 9.0)])
            model[f"{room}.flat_param_0" if room else "flat_param_0"] = padded
            shared = [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]
            entries.append(
                {
                    "fsdp_path": room,
                    "params": {
                        "flat_param_0": {
                            "names": list(held),
                            "shapes": [tensor.shape for tensor in held.values()],
                            "numels": [tensor.numel() for tensor in held.values()],
                            "padding": padding,
                        }
                    },
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [] if room else shared,
                }
            )
        model["decoder.version"] = torch.tensor([3.0])
        metadata = {"param_metadata": entries, "buffer_names": ["decoder.version"]}
        files.append({"model": model, "shard_metadata": metadata})
    return files


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """What `cfg` says of a model."""
    tower = next(iter(config.towers.values()))
    gated = {"silu": "swiglu", "gelu": "geglu"}
    form = gated[tower.activation] if tower.gated else tower.activation
    model = Namespace(
        decoder_attention_heads=tower.num_heads,
        activation_fn=form,
        decoder_normalize_before=True,
        no_scale_embedding=True,
        alibi=False,
        self_attn_doc_sep=-1,
        share_decoder_input_output_embed=config.tied,
    )
    return {"common": {"model_parallel_size": 1, "fp16": True}, "model": model, "task": None}


def save(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    parts: int = 1,
    shards: int = 0,
    packed: bool = True,
    padded: int = 0,
    **saved: Any,
) -> str:
    """Write a checkpoint and return the pattern of its files; `saved` is torch.save's."""
    folder.mkdir(parents=True)
    whole = state_dict(config, tensors, padded=padded)
    rest = {
        "cfg": settings_of(config),
        "args": None,
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "FP16Optimizer", "num_updates": 3}],
        "extra_state": {"metrics": OrderedDict(), "rng": torch.zeros(8, dtype=torch.uint8)},
        "last_optimizer_state": -1,
    }
    for number, part in enumerate(split(whole, parts, packed=packed)):
        mark = f"-model_part-{number}" if parts > 1 else ""
        files = shard(part, shards) if shards else [{"model": OrderedDict(part)}]
        for rank, values in enumerate(files):
            name = f"checkpoint_3{mark}" + (f"-shard{rank}" if shards else "") + ".pt"
            torch.save({**rest, **values}, folder / name, pickle_protocol=2, **saved)
    return str(folder / "checkpoint_3*.pt")
