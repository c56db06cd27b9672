"""What the tests of whole runs train on."""

from pathlib import Path

import pytest

from tests.helpers.training import run_material


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """JAM-Crosses side by side, the path of the first, and a set."""
    return run_material(tmp_path_factory.mktemp("runs"))
