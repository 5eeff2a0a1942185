"""Draw lines over two logarithmic axes as one SVG: labelled at their ends, readable on light and on dark paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 180, 44, 52  # margins; labels of lines stand in the right one
LABEL_GAP = 15  # pixels between the labels of two lines, at least
COLOURS = ("#3b82c4", "#d9762b", "#2f9e6e", "#b54fa0", "#c9a227", "#d0454c", "#6f7fd8", "#5a9aa8", "#8f8f8f")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-size: 15px; font-weight: 600 }
.grid { stroke: #888; stroke-opacity: 0.25 } .axis { stroke: #888 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.dashed { stroke-dasharray: 5 4 } .name { font-weight: 600 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } }
"""

Points = Sequence[tuple[float, float]]


def chart(
    title: str,
    x_name: str,
    y_name: str,
    series: Mapping[str, Points],
    *,
    dashed: frozenset[str] = frozenset(),
    order: Sequence[str] = (),
) -> str:
    """One chart; `dashed` names the series to draw so, a place in `order` is a colour that stays from chart to chart.

    Raises ValueError unless every coordinate is above 0.
    """
    points = [point for line in series.values() for point in line]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError(f"{title}: logarithmic axes need points above 0")
    xs, ys = _range([x for x, _ in points]), _range([y for _, y in points])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (_share(value, low, high) for value, (low, high) in zip(point, (xs, ys), strict=True))
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
        *_axes(xs, ys, at((xs[0], ys[0])), x_name, y_name),
    ]
    ends = {name: at(max(line))[1] for name, line in series.items()}
    heights = _apart(ends)
    order = [*order, *(name for name in series if name not in order)]
    for name, line in series.items():
        colour = COLOURS[order.index(name) % len(COLOURS)]
        places = [at(point) for point in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        style = "line dashed" if name in dashed else "line"
        parts.append(f'<polyline class="{style}" stroke="{colour}" points="{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        place = f'x="{places[-1][0] + 8:.1f}" y="{heights[name] + 4:.1f}"'
        parts.append(f'<text class="name" {place} style="fill:{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axes(
    xs: tuple[float, float], ys: tuple[float, float], origin: tuple[float, float], x_name: str, y_name: str
) -> list[str]:
    x0, y0 = origin
    right, parts = WIDTH - RIGHT, []
    for value in _ticks(*ys):
        y = y0 - _share(value, *ys) * (y0 - TOP)
        parts.append(f'<line class="grid" x1="{x0}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value in _ticks(*xs):
        x = x0 + _share(value, *xs) * (right - x0)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y0}" y2="{y0 + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y0 + 20}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<line class="axis" x1="{x0}" x2="{right}" y1="{y0}" y2="{y0}"/>')
    parts.append(f'<text x="{(x0 + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(f'<text x="{x0}" y="{TOP - 6}">{escape(y_name)}</text>')
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Low and high end of an axis: a little beyond the values."""
    low, high = min(values), max(values)
    return low / 1.15, high * 1.15


def _share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range; powers alone where that is too many."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    few = [power for power in powers if low <= power <= high]
    many = [power * step for power in powers for step in (1, 2, 5) if low <= power * step <= high]
    return many if len(many) <= 9 else few


def _short(value: float) -> str:
    """1,500,000 as 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """The same heights, moved down where two labels would overlap, then all up where the last fell off the chart."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name, height in sorted(heights.items(), key=lambda pair: pair[1]):
        last = placed[name] = max(height, last + LABEL_GAP)
    excess = max(0.0, last - (HEIGHT - BOTTOM))
    return {name: height - excess for name, height in placed.items()}
