"""Every tool starts as a script, which finds its own folder and what is installed."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

SCRIPTS = sorted((ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_what_it_imports(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [each for each in sys.path if each and Path(each).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(script.parent), *others])
    for name in [each for each in sys.modules if each.split(".")[0] == "tools"]:
        monkeypatch.delitem(sys.modules, name)
    found = runpy.run_path(str(script))
    assert callable(found["make_material" if script.stem == "drilled_run" else "main"])
