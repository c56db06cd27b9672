"""What is measured, in whatever form it comes: sets, texts, captions; folders, checkpoints.

Everything becomes a prepared set or a weights folder in a scratch folder, written by the first
rank, so that all ranks of any layout read the same.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_jam.config.data import DataSetConfig
from megatron_jam.config.errors import UsageError
from megatron_jam.config.files import read_json
from megatron_jam.config.log import logger
from megatron_jam.data.prepare.pairs import PairJob
from megatron_jam.data.prepare.pictures import EncodingConfig, ImageEncoding
from megatron_jam.data.prepare.running import Run
from megatron_jam.data.prepare.text import TextJob
from megatron_jam.parallel.world import World
from megatron_jam.tokenizers.text import TextTokenizer
from megatron_jam.training.export import export_checkpoint
from megatron_jam.training.manifest import MANIFEST
from megatron_jam.weights.folder import WeightsFolder

TEXTS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv", ".tsv")
"""Endings of files of texts, a record a line or row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How captions with pictures become codes."""

    image_tokenizer: str = ""
    """Folder of the image tokenizer; with `encoding.codes_per_image` a name for what made codes."""

    folder: Path | None = None
    """Where the pictures are that captions name; by default beside the file."""

    captions_per_image: int = 1
    """Captions of each picture that count, the first ones of the file; COCO has five."""

    encoding: EncodingConfig = dataclasses.field(default_factory=EncodingConfig)
    """How pictures are encoded."""

    def __post_init__(self) -> None:
        if self.captions_per_image < 1:
            raise UsageError(
                f"pictures.captions_per_image is {self.captions_per_image}; it must be at least 1"
            )


@contextmanager
def scratch_folder(path: Path | None, world: World) -> Iterator[Path]:
    """A folder that all ranks know: `path`, which stays, or one of this host, which does not."""
    made = [tempfile.mkdtemp(prefix="megatron_jam-")] if world.rank == 0 and not path else [path]
    dist.broadcast_object_list(made)
    folder = Path(made[0])
    try:
        yield folder
    finally:
        if not path and world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def weights_of(path: Path, scratch: Path, world: World) -> Iterator[Path]:
    """The weights folder at `path`, or one made of the training checkpoint there, which goes once
    it has been used: of a run's checkpoints there is but one at a time."""
    if not (path / MANIFEST).is_file():
        yield path
        return
    scratch.mkdir(parents=True, exist_ok=True)
    # A folder of its own: another process may measure the same checkpoint in the same scratch.
    made = [tempfile.mkdtemp(dir=scratch) if world.rank == 0 else ""]
    dist.broadcast_object_list(made)
    folder = Path(made[0])
    exported = folder / f"{path.resolve().parent.parent.name}-{path.name}"
    try:
        _on_first_rank(world, lambda: export_checkpoint(path, exported))
        yield exported
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def prepared_sets(
    sets: Sequence[DataSetConfig],
    folder: WeightsFolder,
    pictures: PictureConfig,
    scratch: Path,
    world: World,
) -> list[DataSetConfig]:
    """The same sets, each prepared with the tokenizer and vocabulary of `folder`.

    A path is the PREFIX of a prepared set; a table of texts (field text); or captions as COCO's
    .json has them, or as a table with caption and image or codes, laid out caption first.

    Raises:
        UsageError: a set is missing, cannot be read, or lacks an image tokenizer.
    """
    made = []
    for each in sets:
        path = Path(each.path)
        if path.suffix != ".json" and not path.name.endswith(TEXTS):
            made.append(each)
            continue
        if not path.is_file():
            raise UsageError(f"{path} of set {each.name} does not exist")
        prefix = scratch / f"{each.name}-{folder.vocabulary.sha256[:8]}"
        prepare = _Preparation(each.name, path, prefix, folder, pictures)
        _on_first_rank(world, prepare)
        made.append(dataclasses.replace(each, path=str(prefix)))
    return made


@dataclasses.dataclass(frozen=True)
class _Preparation:
    name: str
    path: Path
    prefix: Path
    folder: WeightsFolder
    pictures: PictureConfig

    def __call__(self) -> None:
        """Write the set."""
        logger.info("preparing %s of %s", self.name, self.path)
        known: dict[str, Any] = {
            "tokenizer": TextTokenizer.load(self.folder.tokenizer_path),
            "vocabulary": self.folder.vocabulary,
        }
        path = self.path
        if path.suffix == ".json":
            path = self.prefix.with_name(f"{self.prefix.name}-captions.jsonl")
            captions = coco_captions(self.path, self.pictures)
            path.write_text("".join(json.dumps(each) + "\n" for each in captions))
        if path != self.path or self._has_pictures():
            if not self.pictures.image_tokenizer:
                raise UsageError(f"{self.path} has pictures: give --pictures.image_tokenizer")
            images = ImageEncoding.of(
                self.pictures.image_tokenizer,
                self.folder.vocabulary,
                self.pictures.encoding,
                lambda: torch.device("cpu"),
            )
            job: PairJob | TextJob = PairJob(**known, images=images)
        else:
            job = TextJob(**known)
        Run(inputs=str(path), prefix=str(self.prefix), workers=1).prepare(job)

    def _has_pictures(self) -> bool:
        """Whether the first record of a .jsonl is a caption with a picture."""
        if self.path.suffix != ".jsonl":
            return False
        with self.path.open(encoding="utf-8") as file:
            try:
                first = json.loads(file.readline() or "{}")
            except ValueError:
                return False  # the reader says what is wrong, and in which line
        return isinstance(first, dict) and bool({"image", "codes", "file_name"} & first.keys())


def coco_captions(path: Path, pictures: PictureConfig) -> list[dict[str, str]]:
    """Captions and paths of pictures of a COCO annotation file, in the order of the pictures.

    Raises:
        UsageError: it is none, or a caption is of a picture that it does not list.
    """
    values = read_json(path)
    try:
        names = {each["id"]: str(each["file_name"]) for each in values["images"]}
        captions: dict[int, list[str]] = {number: [] for number in names}
        for each in values["annotations"]:
            captions[each["image_id"]].append(str(each["caption"]).strip())
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no file of captions as COCO's: it needs images (id, file_name) and"
            f" annotations (image_id of one of them, caption); wrong: {error}"
        ) from error
    folder = (pictures.folder or path.parent).resolve()
    return [
        {"caption": caption, "image": str(folder / name)}
        for number, name in names.items()
        for caption in captions[number][: pictures.captions_per_image]
    ]


def _on_first_rank(world: World, act: Callable[[], None]) -> None:
    """Let rank 0 act while the others wait; all raise what it raises."""
    failed: list[UsageError | None] = [None]
    if world.rank == 0:
        try:
            act()
        except UsageError as error:
            failed[0] = error
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]
