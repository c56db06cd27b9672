"""A run's curves are drawn from its metrics.jsonl alone; what is not there is named."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_jam.config.errors import UsageError
from megatron_jam.evaluation.curves import Curves, draw, save_html, save_png, summary


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A training step's line."""
    return {
        "step": step,
        "kind": "train",
        "loss": 5.0 - step,
        "loss_by_modality": {"text": 4.0 - step, "image": 6.0 - step},
        "loss_by_set": {"a": 5.0 - step},
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
        "grad_norm_by_part": {"image": 1.0, "text": 1.5},
        "seconds_per_step": 0.5,
        "seconds": {"data": 0.1, "forward_backward": 0.4},
        "tokens": 100 * step,
        "tokens_per_second_per_rank": 100.0 * step,
        "tflops": 1.5,
        "tflops_full": 2.0,
        "mfu": 0.5,
        "peak_memory_bytes": 2_000_000_000,
        "seconds_left": 65.0,
        **changes,
    }


def validation(step: int, name: str, perplexity: float) -> dict[str, Any]:
    return {"step": step, "kind": "validation", "set": name, "perplexity": {"all": perplexity}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [line(1), line(2, mfu=None), validation(2, "a", 9.0), line(3), validation(3, "a", 12.0)]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"torn')
    return tmp_path / "run"


def test_values(run: Path) -> None:
    curves = Curves.read(run)
    assert curves.of("loss") == ([1, 2, 3], [4.0, 3.0, 2.0])
    assert curves.of("grad_norm_by_part", "text") == ([1, 2, 3], [1.5] * 3)
    assert curves.of("mfu") == ([1, 3], [0.5, 0.5])
    assert curves.keys("loss_by_modality") == ["text", "image"]
    assert curves.perplexities("a") == ([2, 3], [9.0, 12.0])
    curves.validation.append({**validation(4, "a", 1.0), "perplexity": {"text": 1.0}})
    assert curves.perplexities("a") == ([2, 3], [9.0, 12.0]), "one without an average is left out"


def test_summary(run: Path) -> None:
    found = summary(Curves.read(run))
    assert found["steps"] == "3"
    assert found["loss"] == "2.0000 (text 1.000, image 3.000)"
    assert found["median speed"] == "200 tokens/s and rank"
    assert found["last step's speed"].endswith("MFU 50.0%")
    assert found["validation a"] == "perplexity 12.00 at step 3; lowest 9.00 at step 2"


def test_pictures(run: Path) -> None:
    curves = [Curves.read(run)] * 2
    figure = draw(curves)
    drawn = figure.axes[0].get_lines()[-1]
    assert list(drawn.get_xdata()) == [1, 2, 3]
    assert list(drawn.get_ydata()) == [4.0, 3.0, 2.0]
    save_png(figure, run / "curves.png")
    with Image.open(run / "curves.png") as picture:
        assert picture.size == (2200, 990)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    save_html(figure, curves, run / "curves.html")
    page = (run / "curves.html").read_text()
    (svg,) = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert b"<svg" in base64.b64decode(svg)
    assert page.count("<h2>run</h2>") == 2
    assert "http" not in page, "the page is self-contained"


def test_lines_of_older_runs_are_drawn_without_what_they_lack(tmp_path: Path) -> None:
    old = {k: line(1)[k] for k in ("step", "kind", "loss", "learning_rate", "grad_norm")}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    curves = Curves.read(tmp_path)
    assert draw([curves]).axes[1].texts[0].get_text() == "nothing measured"
    assert summary(curves)["steps"] == "1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no metrics.jsonl"),
        ("", "has no training steps yet"),
        ("no json\n", "is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        Curves.read(tmp_path)
