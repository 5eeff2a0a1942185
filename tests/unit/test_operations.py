"""docs/operations.md: its sizes are those that the verb prints, it has every verb, and its messages are in the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from cache.size import Service, cost_of, figures, form_of
from service.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
COUNTS = (1_000_000, 20_000_000, 100_000_000, 1_000_000_000)
OTHERS = {
    "MISCONF",
    "moved",
    "CLUSTERDOWN",
    "No space left on device",
    "releases list",
}  # words of Redis and the system
LEAST = 5  # letters of a part of a message that are looked for


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of all tables, without their heads."""
    tables = re.findall(r"^\|.*\n\|[-:|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for table in tables for line in table.splitlines()]


def test_the_sizes_are_those_of_the_verb() -> None:
    service = Service(workers=4)
    columns = [figures(service, cost_of(form_of(count, heads=4, dim=32), service)) for count in COUNTS]
    wanted = [[name, *(column[place][1] for column in columns)] for place, (name, _, _) in enumerate(columns[0])]
    table = PAGE.split("<!-- sizes -->")[1].split("<!-- /sizes -->")[0]
    assert rows(table + "\n") == wanted[1:]  # the first row is the head


def verbs(command: Any, name: str = "") -> Iterator[str]:
    below = getattr(command, "commands", None)
    if below is None:
        yield name
    else:
        for each, nested in below.items():
            yield from verbs(nested, f"{name} {each}".strip())


def test_every_verb_has_a_row() -> None:
    told = " ".join(row[0] for row in rows(PAGE.split("## Verbs")[1].split("## When")[0]))
    assert [verb for verb in verbs(get_command(app)) if not re.search(rf"`{verb}\b", told)] == []


def literals() -> str:
    """All texts in the code, a line break for what is put in when they are said."""
    found = []
    for room in ("cache", "service", "model"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n\n".join(found)


def test_every_message_is_said_by_the_code() -> None:
    said, told = literals(), PAGE.split("## When something fails")[1].split("\n## ")[0].split("### The store")[1]
    spans = [span for row in rows(told) for span in re.findall(r"`([^`]+)`", row[0]) if span not in OTHERS]
    parts = [part.strip(" :(),") for span in spans for part in re.split(r"\.\.\.|\b[NMR]\b", span)]
    messages = [part for part in parts if len(part) >= LEAST and not re.match(r"/|RANKTOWER_|--", part)]
    assert len(messages) > 60
    assert [part for part in messages if part not in said] == []
