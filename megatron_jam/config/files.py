"""Files and folders that appear whole or not at all; YAML files of settings."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_jam.config.errors import UsageError


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a :class:`UsageError` if it holds anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings; write one `name: value` a line")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a :class:`UsageError` if it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object")
    return values


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to a file that nobody reads yet."""
    with writing(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write `text` (utf-8) to `path`, whose folder is made if needed, through a temporary name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in errors that name no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


class Unchanged:
    """Files that are read for a while, which nobody may write meanwhile."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Note size and time of each."""
        self.states = {str(path): _state(path) for path in paths}
        """Inode, size in bytes and time of change in ns by path; None of what is missing."""

    def check(self) -> None:
        """Raise UsageError, naming the file, if one is not what it was."""
        for path, state in self.states.items():
            if _state(Path(path)) != state:
                raise UsageError(f"{path} was changed while it was read: run this again")


def _state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which it is written; a killed run's is used again."""
    return path.with_name(f".{path.name}.writing")


def publish(temporary: Path, path: Path) -> None:
    """Move a written file to its final name: on disk first, so that a crash leaves old or new."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def check_replaceable(path: Path, marker: str) -> None:
    """Raise :class:`UsageError` unless a folder can be written to `path`; call before work starts.

    What may stand there is an empty folder, or an older one of the kind that holds file `marker`.
    """
    if path.name in ("", ".."):
        raise UsageError(f"{path} cannot be written as a whole: give the folder a name of its own")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path} is a link or a file: name the folder itself")
    if path.exists() and not (path / marker).is_file() and any(path.iterdir()):
        raise UsageError(
            f"{path} is not replaced, as it has files but no {marker}: name another folder"
        )


def check_not_read(output: Path, *inputs: Path) -> None:
    """Raise :class:`UsageError` if a folder that is written to `output` would replace an input."""
    for each in inputs:
        if output.resolve() in (each.resolve(), *each.resolve().parents):
            raise UsageError(
                f"output {output} would replace {each}, which is read: name another folder"
            )


def replace_folder(new: Path, path: Path, *, marker: str) -> None:
    """Move the finished folder `new`, beside `path`, to `path`: on disk first.

    A crash between the two renames leaves the older folder as .NAME.old, and `new`.

    Raises:
        UsageError: what stands at `path` is another kind of folder (:func:`check_replaceable`).
    """
    check_replaceable(path, marker)
    assert (new / marker).is_file(), f"{new} has no {marker}"
    for each in (*new.rglob("*"), new):
        _sync(each)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


class PartFolder:
    """The hidden folder beside `path` in which it is made; of one program at a time."""

    def __init__(self, path: Path) -> None:
        """Nothing is made yet."""
        self.path = path.parent / f".{path.name}.part"
        self._output = path
        self._descriptor = -1

    def open(self) -> None:
        """Make it, unless a killed program left one, and lock it while this process lives.

        Raises:
            UsageError: another program is writing it.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
        except OSError:  # a file system without locks
            busy = False
        else:
            busy = not self._is_own()  # renamed by another that has just finished
        if busy:
            os.close(self._descriptor)
            self._descriptor = -1
            raise UsageError(f"another program is writing {self._output}: wait, or name another")

    def clear(self) -> None:
        """Remove what a killed program left in it."""
        for each in self.path.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    def close(self, *, keep: bool = False) -> None:
        """Unlock it, and remove it unless it is kept or has its name."""
        if self._descriptor < 0:
            return
        if not keep and self._is_own():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def _is_own(self) -> bool:
        """Whether the folder of that name is the one that was locked."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
