"""HTML and SVG elements that escape by default."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters an element."""

    __slots__ = ()


def join(parts: Iterable[object]) -> Markup:
    """The parts one after another, each escaped unless it is Markup."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(str(p)) for p in parts))


def element(name: str, *children: object, **attributes: object) -> Markup:
    """`<name ...>children</name>`; `class_` and `data_x` stand for `class` and `data-x`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def section(title: str, *children: object) -> Markup:
    """A titled part of the page."""
    return Markup(element("section", element("h2", title), *children) + "\n")


def note(*children: object) -> Markup:
    """A muted line of explanation."""
    return element("p", *children, class_="note")


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Markup:
    """A table that scrolls sideways on a narrow screen; a cell given as a `<td>` is kept as it is."""
    head = element("tr", *[element("th", header, scope="col") for header in headers])
    body = [element("tr", *[_cell(cell, first=i == 0) for i, cell in enumerate(row)]) for row in rows]
    whole = element("table", element("thead", head), element("tbody", *body), class_=class_)
    return element("div", whole, class_="scroll")


def _cell(cell: object, first: bool) -> Markup:
    if isinstance(cell, Markup) and cell.startswith("<td"):
        return cell
    return element("th", cell, scope="row") if first else element("td", cell)
