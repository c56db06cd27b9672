"""The drills themselves: real ranks under torchrun, real kills. Minutes, so in test-slow alone."""

import json
from pathlib import Path

import pytest

from tools.drill import DRILLS, main


@pytest.mark.slow
def test_disturbed_runs_end_with_the_weights_of_the_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tmp_path, kills=4, json=True)
    outcomes = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["drill"] for each in outcomes] == ["undisturbed", *DRILLS]
    assert all(each["passed"] for each in outcomes)
