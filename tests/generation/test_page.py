"""The page of generated documents stands alone."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_jam.generation.page import Card, Section, Table, render_page


class Reader(HTMLParser):
    """What a page holds: its text, pictures, tags and everything that it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.images: list[tuple[np.ndarray, str | None]] = []
        self.fetched: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        source = values.get("src") or values.get("href")
        if source is None:
            return
        head, _, data = source.partition(",")
        if head != "data:image/png;base64":
            self.fetched.append(source)
            return
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        self.images.append((np.asarray(picture), values.get("width")))

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []


def picture(size: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_page_holds_everything(tmp_path: Path) -> None:
    small, large, plot = picture(64, 0), picture(300, 1), picture(40, 2)
    plot.save(tmp_path / "plot.png")
    card = Card(title="Is <b> & 'x'?", parts=["before", small, "a\nb", large], note="held out")
    table = Table(columns=["model", "perplexity"], rows=[["JAM-Cross", "7.18"]])
    sections = [
        Section(heading="Documents", text="Some <i>.", cards=[card]),
        Section(heading="Curves", plots=[tmp_path / "plot.png"], table=table),
    ]
    render_page(tmp_path / "page" / "index.html", title="A page", sections=sections)
    reader = Reader((tmp_path / "page" / "index.html").read_text(encoding="utf-8"))
    assert reader.fetched == []
    assert not {"b", "i", "script", "link"} & set(reader.tags)
    body = reader.texts[reader.texts.index("A page", 1) :]
    assert body == [
        *["A page", "Documents", "Some <i>.", "Is <b> & 'x'?", "before", "a\nb", "held out"],
        *["Curves", "model", "perplexity", "JAM-Cross", "7.18"],
    ]
    assert [width for _, width in reader.images] == ["256", "300", None]
    for (shown, _), original in zip(reader.images, [small, large, plot], strict=True):
        np.testing.assert_array_equal(shown, np.asarray(original))
    assert [each.name for each in (tmp_path / "page").iterdir()] == ["index.html"]


def test_empty_sections_leave_nothing(tmp_path: Path) -> None:
    render_page(tmp_path / "index.html", title="T", sections=[Section()])
    reader = Reader((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not {"h2", "p", "table", "img", "article"} & set(reader.tags)


def test_a_missing_plot_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lost\.png"):
        render_page(
            tmp_path / "p.html", title="T", sections=[Section(plots=[tmp_path / "lost.png"])]
        )
    assert not (tmp_path / "p.html").exists()
