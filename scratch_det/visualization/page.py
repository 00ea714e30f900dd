"""A page of HTML that needs no network: a headline, contents, and sections of tables and pictures."""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

HERE = Path(__file__).parent
QUALITY = 80  # of a JPEG
Picture = tuple[str, str]  # words, and the picture as a data URI


@dataclass(frozen=True)
class Section:
    """A part of a page, with what it has of these, in this order.

    Attributes:
        title: also of its line in the contents; its letters and digits are the address, such as #table-1-box-ap.
        note: a sentence above.
        body: HTML, such as a figure that a script draws.
        pictures: shown in a grid, each opens at its full size.
        rows: of a table, the first one is the header; a cell may be Markup.
        notes: sentences below.
        layout: of the pictures, classes of page.css.
        table: "numbers", or "words" where not all columns but the first are numbers.
    """

    title: str
    note: str = ""
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()
    layout: str = "grid small"
    notes: Sequence[str] = ()
    table: str = "numbers"
    body: str = ""

    @property
    def address(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def page_text(title: str, headlines: Sequence[str], sections: Sequence[Section], script: str = "") -> str:
    """The page with the sections that have something to show; ``script``: JavaScript besides that of the tables."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    scripts = [one for one in ((HERE / "page.js").read_text(encoding="utf-8"), script) if one]
    return environment.get_template("page.html").render(
        title=title,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        headlines=headlines,
        sections=[one for one in sections if one.rows or one.pictures or one.body],
        scripts=[Markup(one) for one in scripts],
        digests=[base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts],
    )


def of_svg(svg: str) -> Picture:
    """A figure of ``curves.as_svg`` with its title."""
    title = re.search("<title>(.*?)</title>", svg)
    return unescape(title[1]) if title else "", data_uri(svg.encode(), "svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def as_jpeg(picture: Image.Image) -> str:
    """As a data URI."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY, optimize=True)
    return data_uri(content.getvalue(), "jpeg")
