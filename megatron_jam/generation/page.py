"""One self-contained HTML page of generated documents, plots and tables."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from megatron_jam.config.files import write_text_atomically

TEMPLATE = "page.html.jinja"
SMALLEST_WIDTH = 256  # pixels on the page: a picture of 64 is shown at four times its size


@dataclass(frozen=True, kw_only=True)
class Card:
    """A prompt and what was written for it."""

    title: str
    """The prompt."""

    parts: Sequence[str | Image.Image]
    """Texts and pictures, in order."""

    note: str = ""
    """A small line below, such as where the prompt comes from."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; numbers come as the text that is to be shown."""

    columns: Sequence[str]
    """Heads."""

    rows: Sequence[Sequence[str]]
    """Cells, as many in a row as there are heads; the first is the row's head."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page; what is empty is left out, the rest stands in the order of the fields."""

    heading: str = ""
    """Title of the section."""

    text: str = ""
    """A paragraph."""

    cards: Sequence[Card] = ()
    """Generated documents, side by side where the window is wide."""

    plots: Sequence[Path | str] = ()
    """PNG files, over the whole width; they become part of the page."""

    table: Table | None = None
    """A table."""


def render_page(path: Path | str, *, title: str, sections: Sequence[Section]) -> None:
    """Write a page that needs no other file: pictures and plots are data URIs.

    Raises:
        FileNotFoundError: a plot is missing.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture_uri"] = _picture_uri
    environment.filters["file_uri"] = lambda file: _data_uri(Path(file).read_bytes())
    environment.tests["picture"] = lambda part: isinstance(part, Image.Image)
    template = environment.get_template(TEMPLATE)
    page = template.render(title=title, sections=sections, smallest_width=SMALLEST_WIDTH)
    write_text_atomically(path, page)


def _picture_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
