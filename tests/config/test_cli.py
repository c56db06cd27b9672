"""A command's mistakes: one line on standard error and status 2, other errors untouched."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_jam.config.cli import one_line_errors, run_command
from megatron_jam.config.errors import UsageError


def leaves_with(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit status and standard error of a command in which `error` is raised."""
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("steps is 0"), 2, "steps is 0"),
        (FileNotFoundError(2, "No such file", "a/b.yaml"), 2, "no such file or folder: a/b.yaml"),
        (IsADirectoryError(21, "Is", "a"), 2, "this is a folder where a file is needed: a"),
        (NotADirectoryError(20, "Not", b"a"), 2, "this is a file where a folder is needed: a"),
        (PermissionError(13, "Denied", Path("a/b")), 2, "no permission to use: a/b"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_mistakes_end_with_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leaves_with(error, capsys) == (status, f"error: {line}\n")


def test_one_rank_of_a_machine_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert leaves_with(UsageError("steps is 0"), capsys) == (2, "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UsageError("steps is 0"), "error: steps is 0"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
)
def test_the_reason_ends_the_report_of_torchrun(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and laid out by torchrun's own code; without it nothing is written."""
    path = tmp_path / "error.json"
    for has_torchrun in (False, True):
        if has_torchrun:
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        with pytest.raises((SystemExit, ValueError)), one_line_errors():
            raise error
        assert path.exists() == has_torchrun
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    *_, last, border = str(ChildFailedError("train", {0: failure})).splitlines()
    assert last.removeprefix("  traceback :").strip() == told
    assert set(border) == {"="}


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError("no name"), OSError(28)])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), one_line_errors():
        raise error


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        (["a"], ("a", False, 1)),
        (["a", "--json"], ("a", True, 1)),
        (["--json", "--pairs", "3", "a"], ("a", True, 3)),
        (["a", "--json", "--pairs=3"], ("a", True, 3)),
        (["a", "--json=false"], ("a", False, 1)),
        (["--json", "true", "a"], ("a", True, 1)),
    ],
)
def test_a_flag_by_itself_is_true(arguments: list[str], result: tuple[str, bool, int]) -> None:
    seen = []

    def command(path: str, *, json: bool = False, pairs: int = 1) -> None:
        """A command."""
        seen.append((path, json, pairs))

    run_command(command, arguments)
    assert seen == [result]


def test_other_options_want_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    def command(*, pairs: int = 1) -> None:
        """A command."""

    with pytest.raises(SystemExit):
        run_command(command, ["--pairs"])
    assert "pairs" in capsys.readouterr().err


def greet(name: str) -> None:
    """Say hello.

    Args:
        name: who is greeted.
    """


def test_help_says_each_argument_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(greet, ["--help"])
    text = capsys.readouterr().out
    assert "Say hello." in text
    assert "Args:" not in text
    assert text.count("who is greeted") == 1
