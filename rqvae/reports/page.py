"""A report page: blocks that are added one after the other, and one HTML file that needs nothing else.

Pictures are embedded, style and all; there is no script and no address to load from, so that the file can be mailed.
A new kind of block is a dataclass and a template of its name.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import jinja2
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from rqvae.errors import BadInput
from rqvae.files import write_whole

Cell = str | int | float | bool | list | None


@dataclass(frozen=True)
class Heading:
    """A title within the page."""

    template: ClassVar[str] = "heading.html"
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    template: ClassVar[str] = "paragraph.html"
    text: str


@dataclass(frozen=True)
class Tile:
    """One number that matters: what it is, its value, its unit, and one line on how to read it."""

    label: str
    value: Cell
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """The numbers that matter, side by side."""

    template: ClassVar[str] = "tiles.html"
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Table:
    """Rows under a header; columns of numbers are set flush right."""

    template: ClassVar[str] = "table.html"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str

    @property
    def is_number(self) -> list[bool]:
        """Per column, whether every cell is a number or empty."""
        columns = zip(*self.rows, strict=True)
        return [all(cell is None or _is_number(cell) for cell in column) for column in columns]


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, how wide it is shown, and what its rows are, if it is a sheet."""

    label: str
    uri: str
    width: int
    height: int
    zoom: float
    rows: Sequence[str] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures, each with its label, under one caption."""

    template: ClassVar[str] = "gallery.html"
    pictures: Sequence[Picture]
    caption: str


@dataclass(frozen=True)
class Drawing:
    """A vector drawing, inline, so that it takes the colour of the text and its words can be searched."""

    template: ClassVar[str] = "drawing.html"
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Leaf:
    """A line of a tree: how deep it is, its name, and a mark beside it of a kind (good, bad, open, quiet)."""

    depth: int
    name: str
    mark: str
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Tree:
    """Lines indented by depth, each with a coloured mark."""

    template: ClassVar[str] = "tree.html"
    leaves: Sequence[Leaf]
    caption: str


Block = Heading | Paragraph | Tiles | Table | Gallery | Drawing | Tree


@dataclass
class Page:
    """A page in the making.

    Args:
        title: shown at the top and in the browser's tab.
        subtitle: one line below it.
        footer: last line of the page.
        blocks: what is shown, in order; the methods add to it.
    """

    title: str
    subtitle: str = ""
    footer: str = ""
    blocks: list[Block] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.blocks.append(Heading(text))

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self.blocks.append(Paragraph(text))

    def tiles(self, *tiles: Tile) -> None:
        """Add the numbers that matter."""
        self.blocks.append(Tiles(tiles))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> None:
        """Add a table; a number's exact value is kept in the page beside the shown digits."""
        self.blocks.append(Table(header, rows, caption))

    def drawing(self, svg: str, caption: str) -> None:
        """Add a vector drawing of ours, see `rqvae.reports.curves`."""
        self.blocks.append(Drawing(Markup(svg), caption))

    def tree(self, leaves: Sequence[Leaf], caption: str) -> None:
        """Add a tree."""
        self.blocks.append(Tree(leaves, caption))

    def picture(self, source: Path | bytes, caption: str, zoom: float = 1, rows: Sequence[str] = ()) -> None:
        """Add one picture, see `gallery`; `rows` name the rows of a sheet of equal images, from above."""
        picture = replace(_embed("", source, zoom), rows=rows)
        self.blocks.append(Gallery([picture], caption))

    def gallery(
        self, sources: Mapping[str, Path | bytes], caption: str, zoom: float = 1, width: float | None = None
    ) -> None:
        """Add pictures side by side.

        Args:
            sources: label -> file, or the bytes of a file, in a format that browsers show (PNG, GIF, JPEG).
            caption: what one sees.
            zoom: size of a picture's pixel on the page; pixels stay sharp.
            width: of a picture on the page, in CSS pixels, where `zoom` would make it wider; None for any.

        Raises:
            BadInput: a file that is missing or no picture.
        """
        pictures = [_embed(label, source, zoom) for label, source in sources.items()]
        if width is not None:
            pictures = [replace(picture, zoom=min(zoom, width / picture.width)) for picture in pictures]
        self.blocks.append(Gallery(pictures, caption))

    def render(self) -> str:
        """The page as HTML."""
        return _templates().get_template("page.html").render(page=self)

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all; missing folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.render())
        return path


def show(value: Cell) -> str:
    """A value as a reader wants it: four digits of a number, thousands set apart, a dash for nothing."""
    if value is None:
        return "–"
    if not _is_number(value):
        return value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Cell) -> Markup:
    """A value as HTML; a number with its exact value, as JSON writes it."""
    if not _is_number(value):
        return Markup("<span>{}</span>").format(show(value))
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), show(value))


def _embed(label: str, source: Path | bytes, zoom: float) -> Picture:
    name = f"{source}" if isinstance(source, Path) else f"picture {label!r}"
    if isinstance(source, Path) and not source.is_file():
        raise BadInput(f"{source}: expected a picture, there is no such file")
    data = source.read_bytes() if isinstance(source, Path) else source
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, (width, height) = str(image.get_format_mimetype()), image.size
    except UnidentifiedImageError:
        raise BadInput(f"{name}: expected a picture (PNG, GIF, JPEG), got something else") from None
    return Picture(label, f"data:{kind};base64,{base64.b64encode(data).decode()}", width, height, zoom)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rqvae.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    return environment
