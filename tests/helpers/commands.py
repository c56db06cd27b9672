"""The project's commands as a user runs them: a process each, its output and exit status."""

import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_jam.config.cli import run_command
from tests.helpers.forks import CONTEXT

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240


def tool(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `tools/NAME.py` in the folder `cwd`."""
    return _run(str(ROOT / "tools" / f"{name}.py"), arguments, cwd)


def module(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m NAME` in the folder `cwd`."""
    return _run(name, arguments, cwd)


def fails(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Exactly one line on standard error, which matches, and status 2."""
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(f"error: .*{message}.*", line), line
    assert done.returncode == 2


def run_tool(name: str, *arguments: object) -> None:
    """Run `tools/NAME.py` in this process, which has everything imported."""
    main = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]
    run_command(main, [str(each) for each in arguments])


def failure(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """What a tool that a user's mistake ends with status 2 says on standard error."""
    with pytest.raises(SystemExit) as caught:
        run_tool(name, *arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("error: ")
    return told


def environment() -> dict[str, str]:
    """This process's, without what a surrounding torchrun would have set."""
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(target: str, arguments: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, told = Path(folder, "out"), Path(folder, "told")
        process = CONTEXT.Process(
            target=_command, args=(target, arguments, cwd, environment(), out, told)
        )
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{target} has not ended")
        return subprocess.CompletedProcess(
            [target, *arguments], process.exitcode, out.read_text(), told.read_text()
        )


def _command(
    target: str,
    arguments: tuple[str, ...],
    cwd: Path,
    variables: dict[str, str],
    out: Path,
    told: Path,
) -> None:
    for path, descriptor in ((out, 1), (told, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        sys.path.insert(0, str(Path(target).parent))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
