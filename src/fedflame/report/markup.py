"""HTML and SVG elements that escape by default."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is already HTML. Any other text is escaped when it is put into an element."""

    __slots__ = ()


def join(parts: Iterable[object]) -> Markup:
    """Join the parts; each is escaped unless it is Markup."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(str(p)) for p in parts))


def element(name: str, *children: object, **attributes: object) -> Markup:
    """Return `<name ...>children</name>`. Write `class_` and `data_x` for `class` and `data-x`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def section(title: str, *children: object) -> Markup:
    """Return a part of the page with a title."""
    return Markup(element("section", element("h2", title), *children) + "\n")


def note(*children: object) -> Markup:
    """Return a muted line of explanation."""
    return element("p", *children, class_="note")


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Markup:
    """Return a table that scrolls sideways on a narrow screen. A cell that is a `<td>` is kept as it is."""
    head = element("tr", *[element("th", header, scope="col") for header in headers])
    body = [element("tr", *[_cell(cell, first=i == 0) for i, cell in enumerate(row)]) for row in rows]
    whole = element("table", element("thead", head), element("tbody", *body), class_=class_)
    return element("div", whole, class_="scroll")


def _cell(cell: object, first: bool) -> Markup:
    if isinstance(cell, Markup) and cell.startswith("<td"):
        return cell
    return element("th", cell, scope="row") if first else element("td", cell)
