"""Data sets by name: each adapter writes a log in the documented form (docs/data.md) into a folder, and returns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model.datasets import alimama, cascade, kuairand, movielens, own, retailrocket, taobao, userbehavior
from model.datasets.log import Log, read_log
from model.datasets.schema import FILE
from model.errors import DataError

__all__ = ["DATASETS", "Adapter", "Log", "adopt", "read_log"]

Adapter = Callable[
    [Path | None, Path], Path
]  # (source: a folder or, of cascade, a file; None: the default; folder to write)

DATASETS: dict[str, Adapter] = {
    "alimama": alimama.convert,
    "cascade": cascade.convert,
    "kuairand": kuairand.convert,
    "movielens": movielens.convert,
    "retailrocket": retailrocket.convert,
    "taobao": taobao.convert,
    "userbehavior": userbehavior.convert,
}
HOLDERS = {  # whether a folder has the files of a data set, and which files those are
    "kuairand": (kuairand.holds, kuairand.MARKS),
    "alimama": (alimama.holds, (alimama.SAMPLES,)),
    "userbehavior": (userbehavior.holds, (userbehavior.FILE,)),
    "taobao": (taobao.holds, (taobao.PAIRS,)),
    "retailrocket": (retailrocket.holds, (retailrocket.OFFICIAL, retailrocket.SELECTED)),
}


def adopt(source: Path, out: Path) -> Path:
    """Bring the log of a folder to `out`, whichever adapter its files call for. Raises DataError where none does."""
    if own.holds(source):
        return own.convert(source, out)
    for name, (holds, _) in HOLDERS.items():
        if holds(source):
            return DATASETS[name](source, out)
    if not source.is_dir():
        raise DataError(f"{source} is no folder: give the folder that holds the log")
    known = "; ".join(f"{', '.join(files)} ({name})" for name, (_, files) in HOLDERS.items())
    raise DataError(
        f"{source} holds no {FILE} (a log in the documented form, see docs/data.md) and none of {known}: "
        "give the folder that holds one of them"
    )
