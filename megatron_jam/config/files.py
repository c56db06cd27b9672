"""Files that appear whole or not at all; YAML files of settings."""

import os
from pathlib import Path
from typing import Any

import yaml

from megatron_jam.config.errors import UsageError


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a :class:`UsageError` if it holds anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings; write one `name: value` a line")
    return values


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write `text` (utf-8) to `path`, whose folder is made if needed, through a temporary name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def temporary_name(path: Path) -> Path:
    """The name beside `path` under which it is written; a killed run's is used again."""
    return path.with_name(f".{path.name}.writing")


def publish(temporary: Path, path: Path) -> None:
    """Move a written file to its final name: on disk first, so that a crash leaves old or new."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
