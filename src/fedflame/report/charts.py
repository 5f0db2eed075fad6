"""The charts of the report, as inline SVG. Colours are classes of style.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedflame.report.markup import Markup, element

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 50, 430, 20, 240
LINE_COLOURS = 7
CATEGORY_COLOURS = 9
_LABEL_GAP = 15.0
_ROW = 16


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    colour: int
    """Number of its colour class in style.css."""
    points: Sequence[tuple[float, float]]
    """Pairs of x, such as the round, and value."""
    band: Sequence[tuple[float, float]] = ()
    """Low and high value around each point; empty for a line without a band."""


@dataclass(frozen=True)
class XAxis:
    """The x axis; it starts at zero."""

    label: str = "round"
    show: Callable[[float], str] = "{:.0f}".format
    whole: bool = True
    """Whether its ticks are whole numbers only."""


ROUNDS = XAxis()
MOST_DOTS = 40
"""A line with more points has no dots."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0) / 2
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    y_label: str,
    from_zero: bool = False,
    x_axis: XAxis = ROUNDS,
    end_labels: bool = True,
) -> Markup:
    """Draw lines and bands with axes, a label at the end of each line, and a tooltip on each point."""
    drawn = [line for line in series if line.points]
    ys = [y for line in drawn for _, y in line.points] + [
        y for line in drawn for ends in line.band for y in ends
    ]
    last_x = max([1.0] * x_axis.whole + [x for line in drawn for x, _ in line.points]) or 1.0
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))
    scale = _Scale(last_x, y_ticks[0], y_ticks[-1])
    return element(
        "svg",
        *_axes(scale, y_ticks, y_label, x_axis),
        *[_band(line, scale) for line in drawn if line.band],
        *[_line(line, scale, y_label, x_axis) for line in drawn],
        *(_end_labels(drawn, scale) if end_labels else []),
        viewBox=f"0 0 {WIDTH if end_labels else RIGHT + 10} {HEIGHT}",
        class_="chart",
        role="img",
        aria_label=f"{y_label} by {x_axis.label}",
    )


def _end_labels(drawn: Sequence[Series], scale: _Scale) -> list[Markup]:
    ends = [scale.place(*line.points[-1]) for line in drawn]
    heights = spread([y for _, y in ends])
    return [
        element("text", line.label, x=x + 9, y=_px(y + 4), class_=f"t{line.colour} end")
        for line, (x, _), y in zip(drawn, ends, heights, strict=True)
    ]


@dataclass(frozen=True)
class _Scale:
    last_x: float
    low: float
    high: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * x / self.last_x
        down = BOTTOM - (BOTTOM - TOP) * (y - self.low) / (self.high - self.low)
        return round(across, 1), round(down, 1)


def spread(heights: Sequence[float]) -> list[float]:
    """Move heights apart, in their order, until labels there do not overlap."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + _LABEL_GAP)
    if order:
        placed[order[-1]] = min(placed[order[-1]], max(BOTTOM, heights[order[-1]]))
    for below, above in pairwise(reversed(order)):
        placed[above] = min(placed[above], placed[below] - _LABEL_GAP)
    return placed


def _axes(scale: _Scale, y_ticks: list[float], y_label: str, x_axis: XAxis) -> list[Markup]:
    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))
    most = min(8, int(scale.last_x)) if x_axis.whole else 5
    parts = []
    for value in y_ticks:
        _, y = scale.place(0, value)
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", f"{value:.{digits}f}", x=LEFT - 8, y=y + 4, class_="tick y"))
    for value in ticks(0, scale.last_x, most):
        if value <= scale.last_x:
            x, _ = scale.place(value, scale.low)
            parts.append(element("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="axis"))
            parts.append(element("text", x_axis.show(value), x=x, y=BOTTOM + 18, class_="tick x"))
    parts.append(element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    middle = (LEFT + RIGHT) // 2
    parts.append(element("text", x_axis.label, x=middle, y=HEIGHT - 6, class_="tick x"))
    centre = (TOP + BOTTOM) // 2
    turn = f"rotate(-90 12 {centre})"
    parts.append(element("text", y_label, x=12, y=centre, transform=turn, class_="tick x"))
    return parts


def _band(line: Series, scale: _Scale) -> Markup:
    xs = [x for x, _ in line.points]
    edge = [(x, high) for x, (_, high) in zip(xs, line.band, strict=True)]
    edge += reversed([(x, low) for x, (low, _) in zip(xs, line.band, strict=True)])
    return element("polygon", points=_path([scale.place(*at) for at in edge]), class_=f"t{line.colour} band")


def _line(line: Series, scale: _Scale, y_label: str, x_axis: XAxis) -> Markup:
    places = [scale.place(x, y) for x, y in line.points]
    shown = zip(line.points, places, strict=True) if len(places) <= MOST_DOTS else ()
    dots = [
        element(
            "circle",
            element("title", f"{line.label}, {x_axis.label} {x_axis.show(x)}: {y_label} {y:.4g}"),
            cx=across,
            cy=down,
            r=3.5,
        )
        for (x, y), (across, down) in shown
    ]
    path = element("polyline", points=_path(places))
    return element("g", path, *dots, class_=f"t{line.colour} line")


def sparkline(values: Sequence[float], low: float, high: float, colour: int, title: str) -> Markup:
    """Draw a word-sized line on the scale from low to high, which its neighbours share."""
    span = (high - low) or 1.0
    step = 60 / max(1, len(values) - 1)
    places = [(4 + step * i, 18 - 14 * (value - low) / span) for i, value in enumerate(values)]
    return element(
        "svg",
        element("title", title),
        element("polyline", points=_path(places)),
        element("circle", cx=_px(places[-1][0]), cy=_px(places[-1][1]), r=2.5),
        viewBox="0 0 68 22",
        class_=f"t{colour} line spark",
    )


def stacked_bar(parts: Sequence[tuple[str, int, int]], full: int) -> Markup:
    """Draw a horizontal bar of (name, colour, amount) parts; `full` is the amount of the full width."""
    boxes, start = [], 0
    for name, colour, amount in parts:
        if amount:
            boxes.append(
                element(
                    "rect",
                    element("title", f"{name}: {amount}"),
                    x=f"{100 * start / full:.2f}%",
                    width=f"{100 * amount / full:.2f}%",
                    height=20,
                    class_=f"p{colour}",
                )
            )
            start += amount
    return element("svg", *boxes, class_="bar", width="100%", height=20)


def heat_opacity(frequency: float) -> float:
    """Return the opacity for a frequency: its square root, so that clients with k = 1 are not too pale."""
    return math.sqrt(min(1.0, max(0.0, frequency)))


def heat_map(frequencies: Sequence[Sequence[float]]) -> Markup:
    """Draw layers as rows and experts as columns; an expert that saw no token is an outline."""
    layers, experts = len(frequencies), max(len(row) for row in frequencies)
    cells = [
        _heat_cell(layer, expert, experts, frequency)
        for layer, row in enumerate(frequencies)
        for expert, frequency in enumerate(row)
    ]
    every, apart = -(-layers // 16), -(-experts // 8)
    rows = [
        element("text", layer, x=20, y=layer * _ROW + 12, class_="tick y")
        for layer in range(0, layers, every)
    ]
    columns = [
        element("text", expert, x=f"{100 * (expert + 0.5) / experts:.2f}%", y=12, class_="tick x")
        for expert in range(0, experts, apart)
    ]
    height = layers * _ROW
    return element(
        "div",
        element("svg", *rows, width=24, height=height),
        element("svg", *cells, width="100%", height=height, class_="cells"),
        element("span"),
        element("svg", *columns, width="100%", height=16),
        class_="heat",
    )


def _heat_cell(layer: int, expert: int, experts: int, frequency: float) -> Markup:
    return element(
        "rect",
        element("title", f"layer {layer}, expert {expert}: {frequency:.4f}"),
        x=f"{100 * expert / experts:.2f}%",
        y=layer * _ROW,
        width=f"{96 / experts:.2f}%",
        height=_ROW - 1,
        fill_opacity=f"{heat_opacity(frequency):.2f}" if frequency else None,
        class_=None if frequency else "never",
    )


def heat_legend(marks: Sequence[float] = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)) -> Markup:
    """Draw the legend of a heat map."""
    swatches = [_swatch("never", None, "0 (never activated)")]
    swatches += [_swatch(None, f"{heat_opacity(mark):.2f}", f"{mark:g}") for mark in marks]
    return element("ul", *swatches, class_="legend heat-legend")


def _swatch(class_: str | None, opacity: str | None, label: str) -> Markup:
    box = element("rect", x=1, y=1, width=14, height=12, fill_opacity=opacity, class_=class_)
    return element("li", element("svg", box, width=16, height=14, class_="cells"), label)


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Draw a legend of (class, label) pairs; a class is a colour: `t0` for lines, `p0` for bars."""
    box = element("rect", width=14, height=12, rx=3)
    items = [
        element("li", element("svg", box, width=14, height=12, class_=colour), label)
        for colour, label in entries
    ]
    return element("ul", *items, class_="legend")


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_px(x)},{_px(y)}" for x, y in places)


def _px(value: float) -> str:
    return f"{value:.1f}"
