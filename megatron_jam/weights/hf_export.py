"""A weights folder as a checkpoint folder of Hugging Face.

Where one of transformers' classes computes the model, it becomes that class's; every other one
brings its code along: `reference.py`, and `hf_modeling.py` around it.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import (
    PartFolder,
    Unchanged,
    check_not_read,
    check_replaceable,
    replace_folder,
    write_json,
    writing,
)
from megatron_jam.config.log import logger
from megatron_jam.config.model import MAIN
from megatron_jam.models.parameters import Parameter, parameter_table
from megatron_jam.weights.certificate import certify
from megatron_jam.weights.folder import (
    HUGGING_FACE,
    PROVENANCE,
    WeightsFolder,
    tokenizer_files,
)
from megatron_jam.weights.hf_import import (
    VQ_MODEL,
    read_hugging_face,
    read_tensors,
    tensor_files,
)
from megatron_jam.weights.hf_settings import own_settings, stock_settings
from megatron_jam.weights.huggingface import OWN, hugging_face_name
from megatron_jam.weights.lazy import Lazy
from megatron_jam.weights.load import check_tensors
from megatron_jam.weights.stream import TensorStream

_HERE = Path(__file__).parent


def export_hugging_face(
    source: Path, output: Path, *, own_code: bool = False, vq_model: Path | None = None
) -> dict[str, Any]:
    """Write a model for `AutoModelForCausalLM.from_pretrained`; return the certificate.

    Args:
        source: weights folder.
        output: folder to make.
        own_code: bring the code along even where a class of transformers computes the model.
        vq_model: Chameleon at Hugging Face, whose image tokenizer goes into a Chameleon's folder.

    Raises:
        UsageError: `output` is another kind of folder, or a file was changed meanwhile.
    """
    folder = WeightsFolder(source)
    check_not_read(output, folder.path, vq_model or folder.path)
    _check_output(output)
    check_tensors(folder)
    settings = {} if own_code else _stock(folder, vq_model)
    settings = settings or own_settings(folder.config, folder.vocabulary)
    settings["dtype"] = str(folder.dtype).removeprefix("torch.")
    along, unchanged = _image_tokenizer(settings, vq_model)
    making = PartFolder(output)
    making.open()
    part = making.path
    try:
        making.clear()
        hashes = _write_tensors(folder, settings["model_type"], along, part)
        _write_small_files(folder, settings, part)
        certificate = _certificate(folder, part)
        for files in (folder.unchanged, unchanged):
            files.check()
        write_json(
            part / PROVENANCE,
            {
                "made_by": "tools/convert_hf.py",
                "parents": {"weights": {"folder": str(folder.path), "sha256": folder.sha256}},
                "image_tokenizer_sha256": folder.image_tokenizer_sha256,
                "sha256": hashes,
                "certificate": certificate,
            },
        )
        _check_output(output)
        replace_folder(part, output, marker=PROVENANCE)
    finally:
        making.close()
    return certificate


def _check_output(path: Path) -> None:
    """Raise UsageError unless an export can be written to `path`: an older one may stand there."""
    check_replaceable(path, PROVENANCE)
    if (path / PROVENANCE).exists() and not (path / HUGGING_FACE).exists():
        raise UsageError(f"{path} is not replaced, as it is a weights folder: name another")


def _stock(folder: WeightsFolder, vq_model: Path | None) -> dict[str, Any]:
    """Settings of the class that computes the model; none, and a word why, if there is none."""
    found = stock_settings(folder.config, folder.vocabulary, vq_model)
    if isinstance(found, str):
        logger.info("%s: the folder brings its own code (trust_remote_code=True)", found)
        return {}
    return found


def _image_tokenizer(
    settings: dict[str, Any], vq_model: Path | None
) -> tuple[dict[str, Lazy], Unchanged]:
    """What goes into a Chameleon's folder besides the model, by key."""
    if vq_model is None:
        return {}, Unchanged([])
    if settings["model_type"] != "chameleon":
        raise UsageError("--vq_model is for models that leave as a Chameleon")
    files = tensor_files(vq_model)
    unchanged = Unchanged(files)
    found = {k: v for k, v in read_tensors(files).items() if k.startswith(f"{VQ_MODEL}.")}
    if not found:
        raise UsageError(f"{vq_model} has no {VQ_MODEL}: name a Chameleon with its image tokenizer")
    return found, unchanged


def _write_tensors(
    folder: WeightsFolder, kind: str, along: dict[str, Lazy], part: Path
) -> dict[str, str]:
    """Write the model's tensors and those that go along; return the sha256 of each."""
    table = parameter_table(folder.config)
    shapes = {hugging_face_name(each.name, kind): _shape(folder, each, kind) for each in table}
    shapes |= {key: tensor.shape for key, tensor in along.items()}
    with closing(TensorStream(part, shapes, folder.dtype)) as stream:
        for entry, (key, shape) in zip(table, shapes.items(), strict=False):
            stream.write(key, folder.read(entry.name).view(shape))
        for key, tensor in along.items():
            stream.write(key, _as_model(key, tensor.read(), folder.dtype))
        stream.finish()
        hashes = stream.hashes
    for entry, key in zip(table, shapes, strict=False):  # the bytes are the same
        if hashes[key] != folder.hashes[entry.name]:
            raise UsageError(f"{folder.path}: {entry.name} is not what was written: copy it again")
    return hashes


def _as_model(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What goes along in the model's dtype, which transformers loads all in."""
    found = tensor.to(dtype)
    if not torch.equal(found.isfinite(), tensor.isfinite()):
        raise UsageError(f"{key} has numbers too large for {dtype}: export the model in another")
    if not torch.equal(found.to(tensor.dtype), tensor):
        logger.info("%s is rounded from %s to the model's %s", key, tensor.dtype, dtype)
    return found


def _shape(folder: WeightsFolder, entry: Parameter, kind: str) -> tuple[int, ...]:
    """A tensor's shape there: norms of heads lie there head by head."""
    if (
        kind != OWN
        and entry.name.endswith(("_norm.weight", "_norm.bias"))
        and (".attention.q_" in entry.name or ".attention.k_" in entry.name)
    ):
        return (entry.shape[0] // (size := folder.config.towers[MAIN].head_size), size)
    return entry.shape


def _write_small_files(folder: WeightsFolder, settings: dict[str, Any], part: Path) -> None:
    write_json(part / "config.json", settings)
    write_json(part / HUGGING_FACE, _tokenizer_settings())
    for name, content in tokenizer_files(folder.path).items():
        with writing(part / name):
            (part / name).write_bytes(content)
    if settings["model_type"] != OWN:
        return
    for source, name in (("reference.py", "reference.py"), ("hf_modeling.py", "modeling_jam.py")):
        # There the two stand side by side, without this package.
        text = (_HERE / source).read_text().replace("megatron_jam.weights.reference", ".reference")
        with writing(part / name):
            (part / name).write_text(text)


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
