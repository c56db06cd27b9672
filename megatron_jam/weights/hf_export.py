"""A weights folder as a checkpoint folder of Hugging Face: a stock OPT or Llama."""

import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import check_replaceable, replace_folder, write_json
from megatron_jam.config.model import MAIN, ModelConfig, TowerConfig
from megatron_jam.models.parameters import parameter_table
from megatron_jam.tokenizers.vocabulary import JointVocabulary
from megatron_jam.weights.certificate import certify
from megatron_jam.weights.folder import PROVENANCE, TOKENIZER, WeightsFolder
from megatron_jam.weights.hf_import import read_hugging_face
from megatron_jam.weights.huggingface import hugging_face_name
from megatron_jam.weights.load import check_tensors
from megatron_jam.weights.stream import INDEX, TensorStream

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
_OPT_EPSILON = 1e-5
_OPT_OFFSET = 2


def export_hugging_face(source: Path, output: Path) -> dict[str, Any]:
    """Write a model of one tower as Hugging Face's OPT or Llama; return the certificate.

    Args:
        source: weights folder.
        output: folder to make, which `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        UsageError: neither of the two computes such a model, or `output` is another kind of folder.
    """
    folder = WeightsFolder(source)
    check_replaceable(output, INDEX)
    if output.resolve() == folder.path.resolve():
        raise UsageError(f"output {output} is the model itself; name another folder")
    check_tensors(folder)
    settings = hugging_face_settings(folder.config, folder.vocabulary)
    table = parameter_table(folder.config)
    names = {entry.name: hugging_face_name(entry.name, settings["model_type"]) for entry in table}
    dtype = folder.read(folder.names[0], 0, 0, 1).dtype
    settings["dtype"] = str(dtype).removeprefix("torch.")
    part = output.parent / f".{output.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        shapes = {names[entry.name]: entry.shape for entry in table}
        stream = TensorStream(part, shapes, dtype)
        for name, key in names.items():
            stream.write(key, folder.read(name))
        stream.finish()
        write_json(part / "config.json", settings)
        write_json(part / "tokenizer_config.json", _tokenizer_settings())
        shutil.copyfile(folder.tokenizer_path, part / TOKENIZER)
        certificate = _certificate(folder, part)
        write_json(
            part / PROVENANCE,
            {
                "made_by": "tools/convert_hf.py",
                "parents": {"weights": {"folder": str(folder.path), "sha256": folder.sha256}},
                "sha256": stream.hashes,
                "certificate": certificate,
            },
        )
        replace_folder(part, output, marker=INDEX)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # renamed and gone where all went well
    return certificate


def hugging_face_settings(config: ModelConfig, vocabulary: JointVocabulary) -> dict[str, Any]:
    """The config.json of an OPT or a Llama that computes what `config` describes.

    Raises:
        UsageError: neither does; the message says why.
    """
    if config.is_pair:
        raise UsageError(
            "Hugging Face has no model of two towers: take one out with tools/unfuse.py"
        )
    tower = config.towers[MAIN]
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": tower.hidden_size,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }
    unlike_opt, unlike_llama = _unlike_opt(tower, config), _unlike_llama(tower)
    if not unlike_opt:
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            **common,
            "ffn_dim": tower.inner_size,
            "word_embed_proj_dim": tower.hidden_size,
            "activation_function": _ACTIVATIONS[tower.activation],
            "do_layer_norm_before": True,
            "enable_bias": tower.bias,
            "layer_norm_elementwise_affine": tower.affine_norm,
            "dropout": 0.0,
        }
    if not unlike_llama:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **common,
            "intermediate_size": tower.inner_size,
            "num_key_value_heads": tower.kv_heads,
            "hidden_act": _ACTIVATIONS[tower.activation],
            "rms_norm_eps": tower.norm_epsilon,
            "rope_theta": tower.rope_base,
            "attention_bias": tower.bias,
            "mlp_bias": tower.bias,
        }
    raise UsageError(
        f"neither OPT nor Llama of Hugging Face computes this tower: no OPT has"
        f" {', '.join(unlike_opt)}; no Llama has {', '.join(unlike_llama)}"
    )


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
    unlike = {
        "learned positions": tower.positions != "rope",
        "norm layer": tower.norm != "rms",
        "norms without scale": not tower.affine_norm,
        f"norm_groups {tower.norm_groups}": tower.norm_groups != 1,
        "an FFN without a gate": not tower.gated,
        "qk_norm": tower.qk_norm,
    }
    return [name for name, differs in unlike.items() if differs]


def _tokenizer_settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }


def _certificate(folder: WeightsFolder, made: Path) -> dict[str, Any]:
    """What was written, read as any folder of Hugging Face is, against the source."""
    back = read_hugging_face(made, folder.path)

    def result(name: str) -> torch.Tensor:
        return back.tensors[name].read()

    return certify(folder.config, folder.read, result)
