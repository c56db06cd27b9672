"""Run a typed function as a command: parse, call, and turn a user's mistake into one line."""

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from inspect import cleandoc
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_parsing_settings,
)

from megatron_jam.config.errors import UsageError
from megatron_jam.config.faults import tell_of_cut_files
from megatron_jam.config.log import configure_logging

EXIT_USAGE = 2

_PATH_ERRORS = {
    FileNotFoundError: "no such file or folder",
    IsADirectoryError: "this is a folder where a file is needed",
    NotADirectoryError: "this is a file where a folder is needed",
    PermissionError: "no permission to use",
}
_DISK_ERRORS = {
    errno.ENOSPC: "no space left on the disk for",
    errno.EDQUOT: "the disk quota is used up by",
    errno.EFBIG: "larger than a file may be here:",
    errno.EROFS: "the disk is read-only:",
    errno.EIO: "the disk cannot read or write",
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run_command(function: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Parse `arguments` by the signature of `function`, call it, and exit with its status.

    Parameters without a default are positional, the others are options; the docstring is the help.
    A :class:`UsageError`, a path that cannot be used or a wrong argument prints one line and exits
    with status 2.
    """
    configure_logging()
    tell_of_cut_files()
    with one_line_errors():
        # Its Args are said option by option.
        about = cleandoc(function.__doc__ or "").split("\n\nArgs:")[0]
        parser = ArgumentParser(description=about, exit_on_error=False)
        parser.add_function_arguments(function, as_group=False, as_positional=True)
        parsed = parser.instantiate_classes(parse(parser, arguments))
        function(**vars(parsed) if isinstance(parsed, Namespace) else parsed)


def parse(parser: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Parse with `parser`; a wrong argument is a :class:`UsageError` of one line."""
    try:
        return parser.parse_args(_spelt_out(parser, arguments))
    except ArgumentError as error:
        raise UsageError(f"{_one_line(error)} (see --help)") from error


def _spelt_out(parser: ArgumentParser, arguments: Sequence[str] | None) -> list[str]:
    """`--json` by itself is `--json true`, and so for every option of type bool."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = {
        name
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for name in action.option_strings
    }
    spelt: list[str] = []
    for each, following in zip_longest(given, given[1:], fillvalue="--"):
        spelt += [each, "true"] if each in flags and following.startswith("--") else [each]
    return spelt


class one_line_errors:
    """Context in which a user's mistake ends the process with one line and status 2.

    Under torchrun it, or the traceback of any other failure, also ends torchrun's report.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: object
    ) -> Literal[False]:
        if isinstance(error, KeyboardInterrupt):
            _leave("interrupted", 130)
        if isinstance(error, UsageError):
            _leave(str(error), EXIT_USAGE)
        for each, reason in _PATH_ERRORS.items():
            if isinstance(error, each) and error.filename is not None:
                _leave(f"{reason}: {Path(os.fsdecode(error.filename))}", EXIT_USAGE)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            # Of a copy's two files the second is the one that is written.
            path = error.filename2 or error.filename or "what was written"
            _leave(f"{_DISK_ERRORS[error.errno]} {path}", EXIT_USAGE)
        if isinstance(error, Exception):
            tell_torchrun("".join(traceback.format_exception(error)).rstrip())
        return False


def tell_torchrun(message: str) -> None:
    """Why this process is about to fail: torchrun's report, the last that its user sees, ends with
    what the first rank that failed has told. Without torchrun nothing happens."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # What torch.distributed.elastic.multiprocessing.errors.record writes.
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        told = {"message": {"message": message, "extraInfo": about}}
        Path(path).write_text(json.dumps(told), encoding="utf-8")


def _leave(message: str, status: int) -> None:
    tell_torchrun(f"error: {message}")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"error: {message}\n")
    sys.exit(status)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    # As which class the items of a list were parsed tells a user nothing.
    told = [line for line in lines if line and not line.startswith("Problem with given class_path")]
    return " ".join(told) or type(error).__name__
