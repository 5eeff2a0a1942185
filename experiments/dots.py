"""Draw one value a row with its deviation as one SVG, in the looks of benchmarks/svg.py."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from benchmarks.svg import COLOURS, STYLE

WIDTH, LEFT, RIGHT, TOP, ROW = 760, 200, 70, 44, 26


def dots(title: str, rows: Mapping[str, tuple[float, float]], *, reference: str) -> str:
    """A dot at each row's mean and a line of one deviation to each side, none of NaN; the reference in colour."""
    ends = [mean + sign * (0.0 if sd != sd else sd) for mean, sd in rows.values() for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    height = TOP + ROW * len(rows) + 40

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="12" y="22">{escape(title)}</text>',
    ]
    for k in range(5):
        value = low + (high - low) * k / 4
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{height - 30}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{height - 12}" text-anchor="middle">{value:.4f}</text>')
    for place, (name, (mean, sd)) in enumerate(rows.items()):
        y, colour = TOP + ROW * (place + 0.5), COLOURS[0 if name == reference else -1]
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if sd == sd:
            span = f'x1="{x(mean - sd):.1f}" x2="{x(mean + sd):.1f}"'
            parts.append(f'<line class="line" stroke="{colour}" {span} y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<circle cx="{x(mean):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{mean:.4f}</text>')
    return "\n".join([*parts, "</svg>\n"])
