"""What every benchmark shares: the machine it ran on, quantiles, bars, a printed table and one tidy JSON file.

var/bench/NAME.json is {"benchmark", "machine", "settings", "rows", "bars", "notes"}. A row is one measurement: flat,
its fields the same for all rows of a kind, times in microseconds (`p50_us`, `median_us`), never a path of the machine.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

RESULTS = Path("var/bench")
LIBRARIES = ("numpy", "onnxruntime", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "orjson", "msgspec",
             "pydantic", "redis", "hiredis", "pyarrow")  # fmt: skip
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
NOT_SHOWN = "-"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A figure that must lie on one side of a limit; None where this run could not measure it."""

    name: str
    value: float | None
    side: Literal["at most", "at least"]
    limit: float
    stretch: float | None = None

    def reaches(self, limit: float | None) -> bool | None:
        """Whether the value is on the right side of a limit; None without value or limit."""
        if self.value is None or limit is None:
            return None
        return self.value <= limit if self.side == "at most" else self.value >= limit

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if not self.reaches(self.limit):
            return "MISSED"
        return "met, stretch too" if self.reaches(self.stretch) else "met"


@dataclass(slots=True)
class Report:
    """One run of one benchmark."""

    benchmark: str
    settings: Row
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """NAME.json in `folder`, complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        document = {
            "benchmark": self.benchmark,
            "machine": machine(),
            "settings": dict(self.settings),
            "rows": self.rows,
            "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in self.bars],
            "notes": self.notes,
        }
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)
        return path


def read(path: Path) -> dict[str, Any]:
    """A document that `Report.write` wrote. Raises FileNotFoundError or ValueError naming the file."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: run the benchmark that writes it") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): run the benchmark that writes it again") from error
    if not isinstance(document, dict) or not {"benchmark", "machine", "rows", "bars"} <= document.keys():
        raise ValueError(f"{path} is not the result of a benchmark: run it again")
    return document


# --- figures ---------------------------------------------------------------------------------------------------------


def quantile(times: Sequence[float] | NDArray[np.float64], share: float) -> float:
    """The smallest time that at least `share` of all do not exceed; no value between two measured ones."""
    return float(np.quantile(np.asarray(times, np.float64), share, method="inverted_cdf"))


def median(values: Sequence[float]) -> float:
    """The middle value, of an even number the mean of the two."""
    return float(np.median(np.asarray(values, np.float64)))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Median over rounds of the ratio within a round: what slows a whole round down cancels out."""
    pairs = list(zip(above, below, strict=False))
    return median([a / b for a, b in pairs]) if pairs else None


@contextmanager
def no_collection() -> Iterator[None]:
    """No pause of this process's garbage collector within the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- text ------------------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text in columns: words flush left, numbers flush right."""
    texts = [list(heads), *([shown(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in texts) for k in range(len(heads))]
    justify = [str.rjust if numeric else str.ljust for numeric in _numeric(len(heads), rows)]
    lines = [
        "  ".join(flush(cell, width) for flush, cell, width in zip(justify, row, widths, strict=True)).rstrip()
        for row in texts
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same as a table of a Markdown page."""
    rules = ["--:" if numeric else "---" for numeric in _numeric(len(heads), rows)]
    lines = [heads, rules, *([shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(columns: int, rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Whether a column holds a number."""
    return [any(isinstance(row[k], int | float) for row in rows) for k in range(columns)]


def shown(value: Any) -> str:
    """A cell: three significant digits below 100, whole numbers with separators above."""
    if value is None:
        return NOT_SHOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


BAR_HEADS = ("", "measured", "bar", "stretch", "")


def bar_rows(bars: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Cells of the bars of a document, for `table` and `markdown`."""
    sign = {"at most": "<=", "at least": ">="}
    return [
        [
            bar["name"],
            bar["value"],
            f"{sign[bar['side']]} {bar['limit']:g}",
            NOT_SHOWN if bar["stretch"] is None else f"{sign[bar['side']]} {bar['stretch']:g}",
            bar["verdict"],
        ]
        for bar in bars
    ]


def print_bars(bars: Sequence[Bar]) -> None:
    """The must-show figures beside their bars."""
    print(table(BAR_HEADS, bar_rows([{**asdict(bar), "verdict": bar.verdict} for bar in bars])))


# --- the machine -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, caches, memory, versions, commit and time: what a reader needs to place the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in one line."""
    caches = ", ".join(f"{name} {size}" for name, size in found["caches"].items())
    commit = found["commit"] or "no commit"
    return (
        f"{found['cpu']}, {found['cores']} cores ({caches or 'caches unknown'}), {found['memory_gib']:g} GiB, "
        f"{found['system']}, Python {found['python']}, {commit}, {found['time']}"
    )


def _cpu_model() -> str:
    """The model name; virtual machines hide it, then family and model number tell more than `Processor`."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    name = facts.get("model name") or facts.get("CPU part") or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def _caches() -> dict[str, str]:
    """Size by level: {"L1d": "48K", "L2": "2048K", "L3": "..."}."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the tree, with a + where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
