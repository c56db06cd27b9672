"""The quickstart's configurations parse, and its stages are skipped or run anew rightly."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_jam.config.fusion import FusionRecipe
from megatron_jam.config.model import ModelConfig
from megatron_jam.config.run import load_run_config

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
CONFIGS = sorted((QUICKSTART / "configs").glob("*.yaml"))


def test_every_configuration_parses() -> None:
    kinds = set()
    for path in CONFIGS:
        values = yaml.safe_load(path.read_text())
        if "towers" in values:
            config = ModelConfig.from_dict({**values, "vocab_size": 2066})
            assert config.hidden_size == values["towers"]["main"]["hidden_size"]
            kinds.add("model")
        elif "method" in values:
            assert FusionRecipe.load(path).method == path.stem
            kinds.add("recipe")
        else:
            run = load_run_config(["--config", str(path)])
            assert run.steps == values["steps"]
            assert run.num_micro_batches(2) == 1
            kinds.add("run")
    assert kinds == {"model", "recipe", "run"}


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py with its output below a temporary folder."""
    spec = importlib.util.spec_from_file_location("quickstart_run", QUICKSTART / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart_run", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return module


def stage(module: ModuleType, name: str, script: str) -> object:
    """A stage whose one command runs a line of Python and writes the file of its name."""
    path = module.OUT / name
    command = [sys.executable, "-c", f"import pathlib; p = pathlib.Path({str(path)!r}); {script}"]
    return module.Stage(name=name, title=name, commands=[command], writes=[path])


def test_finished_stages_are_skipped_and_failed_ones_start_anew(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = "open('log', 'a').write(p.name + ' ')"
    good = f"{log}; p.parent.mkdir(parents=True, exist_ok=True); p.write_text('x')"
    bad = f"{log}; assert not p.exists(); p.write_text('half'); raise SystemExit(3)"
    monkeypatch.setattr(
        quickstart, "stages", lambda: [stage(quickstart, "a", good), stage(quickstart, "b", bad)]
    )
    assert quickstart.main() == 3
    assert quickstart.main() == 3  # b's leftover is gone before its command runs again
    assert Path("log").read_text() == "a b b "
    monkeypatch.setattr(
        quickstart, "stages", lambda: [stage(quickstart, "a", good), stage(quickstart, "b", good)]
    )
    assert quickstart.main() == 0
    assert quickstart.main() == 0
    assert Path("log").read_text() == "a b b b "


def test_a_changed_stage_repeats_those_after_it(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = "open('log', 'a').write(p.name + ' '); p.parent.mkdir(exist_ok=True, parents=True); "

    def install(first: str) -> None:
        both = [stage(quickstart, n, write + f"p.write_text({first!r})") for n in ("a", "b")]
        monkeypatch.setattr(quickstart, "stages", lambda: both)

    install("1")
    assert quickstart.main() == 0
    install("2")
    assert quickstart.main() == 0
    assert Path("log").read_text() == "a b a b "


def test_all_stages_have_names_of_their_own_and_write_below_outputs(quickstart: ModuleType) -> None:
    todo = quickstart.stages()
    assert len({each.name for each in todo}) == len(todo) == 12
    assert all(quickstart.OUT in path.parents for each in todo for path in each.writes)
