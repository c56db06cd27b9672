"""Which of Hugging Face's classes computes a model, and the config.json that says so."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json
from megatron_jam.config.model import MAIN, ModelConfig, TowerConfig
from megatron_jam.models.parameters import parameter_table
from megatron_jam.tokenizers.named import image_token_name
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.huggingface import OWN, Settings
from megatron_jam.weights.reference import num_attentions

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
_OPT_EPSILON = 1e-5
_OPT_OFFSET = 2


def stock_settings(
    config: ModelConfig, vocabulary: JointVocabulary, vq_model: Path | None
) -> dict[str, Any] | str:
    """The config.json of an OPT, a Llama or a Chameleon that computes what `config` describes.

    Args:
        config: the model.
        vocabulary: its ids.
        vq_model: folder of a Chameleon, whose image tokenizer a Chameleon needs.

    Returns:
        The settings; or why no class computes it.
    """
    if config.is_pair:
        return "no class of transformers has two towers"
    tower = config.towers[MAIN]
    unlike = {
        "OPT": _unlike_opt(tower, config),
        "Llama": _unlike_llama(tower),
        "Chameleon": _unlike_chameleon(tower, vq_model),
    }
    common = _common(config, vocabulary)
    if not unlike["OPT"]:
        return {**common, **_opt(tower)}
    if not unlike["Llama"]:
        return {**common, **_llama(tower), "model_type": "llama"}
    if not unlike["Chameleon"]:
        assert vq_model is not None
        return {**common, **_chameleon(tower, vocabulary, vq_model)}
    reasons = (f"no {kind} has {', '.join(lacking)}" for kind, lacking in unlike.items())
    return f"no class of transformers computes this tower: {'; '.join(reasons)}"


def own_settings(config: ModelConfig, vocabulary: JointVocabulary) -> dict[str, Any]:
    """The config.json of any model with its own code (`hf_modeling.py`)."""
    code = "modeling_jam"
    shapes = {entry.name: list(entry.shape) for entry in parameter_table(config)}
    return {
        **_common(config, vocabulary),
        "model_type": OWN,
        "architectures": ["JamForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.JamConfig",
            "AutoModelForCausalLM": f"{code}.JamForCausalLM",
        },
        # Places in the cache; the code itself ties the tables.
        "num_hidden_layers": num_attentions(config),
        "tie_word_embeddings": False,
        "model": dataclasses.asdict(config),
        "shapes": shapes,
    }


def _common(config: ModelConfig, vocabulary: JointVocabulary) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }


def _opt(tower: TowerConfig) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "num_attention_heads": tower.num_heads,
        "ffn_dim": tower.inner_size,
        "word_embed_proj_dim": tower.hidden_size,
        "activation_function": _ACTIVATIONS[tower.activation],
        "do_layer_norm_before": True,
        "enable_bias": tower.bias,
        "layer_norm_elementwise_affine": tower.affine_norm,
        "dropout": 0.0,
    }


def _llama(tower: TowerConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.inner_size,
        "num_key_value_heads": tower.kv_heads,
        "hidden_act": _ACTIVATIONS[tower.activation],
        "rms_norm_eps": tower.norm_epsilon,
        "rope_theta": tower.rope_base,
        "attention_bias": tower.bias,
        "mlp_bias": tower.bias,
    }


def _chameleon(tower: TowerConfig, vocabulary: JointVocabulary, vq_model: Path) -> dict[str, Any]:
    file = vq_model / "config.json"
    image_tokenizer = Settings(read_json(file), file).part("vq_config")
    if not image_tokenizer.values:
        raise UsageError(f"{vq_model} is no Chameleon: its config.json has no vq_config")
    codes = image_tokenizer.get("num_embeddings", int, 8192)
    if codes != vocabulary.image.size:
        raise UsageError(
            f"{vq_model} has {codes} image codes, the model {vocabulary.image.size}: name the"
            " Chameleon whose image tokenizer it knows"
        )
    ids = vocabulary.image_id(range(codes)).tolist()
    return {
        **_llama(tower),
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "swin_norm": False,
        "vq_config": image_tokenizer.values,
        # No text has <unk>, so it can stand where a picture is to be put in.
        "vocabulary_map": {image_token_name(code): each for code, each in enumerate(ids)}
        | {"<image>": vocabulary.unk},
    }


def _unlike_opt(tower: TowerConfig, config: ModelConfig) -> list[str]:
    """Settings that no OPT has."""
    unlike = {
        "positions rope": tower.positions != "learned",
        "norm rms": tower.norm != "layer",
        "a gated FFN": tower.gated,
        "grouped queries": tower.kv_heads != tower.num_heads,
        "qk_norm": tower.qk_norm,
        f"norm_groups {tower.norm_groups}": tower.norm_groups != 1,
        f"norm_epsilon {tower.norm_epsilon}": tower.norm_epsilon != _OPT_EPSILON,
        f"position_offset {config.position_offset}": config.position_offset != _OPT_OFFSET,
    }
    return [name for name, differs in unlike.items() if differs]


def _unlike_llama(tower: TowerConfig) -> list[str]:
    """Settings that no Llama has."""
    return [*_unlike_both(tower), *(["qk_norm"] if tower.qk_norm else [])]


def _unlike_chameleon(tower: TowerConfig, vq_model: Path | None) -> list[str]:
    """Settings that no Chameleon has, and what this one lacks."""
    unlike = [*_unlike_both(tower), *([] if tower.qk_norm else ["no qk_norm"])]
    return unlike + ([] if vq_model else ["no image tokenizer (add --vq_model)"])


def _unlike_both(tower: TowerConfig) -> list[str]:
    unlike = {
        "learned positions": tower.positions != "rope",
        "norm layer": tower.norm != "rms",
        "norms without scale": not tower.affine_norm,
        f"norm_groups {tower.norm_groups}": tower.norm_groups != 1,
        "an FFN without a gate": not tower.gated,
    }
    return [name for name, differs in unlike.items() if differs]
