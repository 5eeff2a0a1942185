"""What came after a release: newer records and deleted ids, folded into one small file that lies over its table.

The file is a snapshot, named `<watermark>-<held>.snap`: the first `held` ids have the records of its rows, the others,
whose rows are zeros, are deleted. One process folds it, all workers of a replica map it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.errors import SnapshotError
from cache.snapshot import Ids, IdType, Snapshot, SnapshotWriter
from kernel.engine import Table
from kernel.errors import KernelError
from kernel.plain import ItemLayout

NAME = re.compile(r"(\d{1,19})-(\d{1,10})\.snap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """An opened overlay. Immutable."""

    items: Snapshot  # newer ids, then deleted ones
    held: int  # how many of them have a record
    watermark: int  # position of the last change that is in it

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map the file. Raises SnapshotError unless it is whole by its sizes and its name."""
        found = NAME.fullmatch(path.name)
        if found is None:
            raise SnapshotError(f"{path} is no overlay: its name must say its watermark and how many records it holds")
        items, held = Snapshot.open(path), int(found[2])
        if held > len(items):
            raise SnapshotError(f"{path} says that it holds {held} records, and has {len(items)}: delete the file")
        return cls(items=items, held=held, watermark=int(found[1]))

    @property
    def deleted(self) -> int:
        """How many ids it takes away."""
        return len(self.items) - self.held

    def over(self, table: Table) -> Table:
        """The table of a release under this overlay. Raises SnapshotError where they are of unlike form."""
        try:
            return table.under(self.items.rows[: self.held], self.items.finder)
        except KernelError as error:
            raise SnapshotError(f"{self.items.path}: {error}: delete the file") from error

    def hides(self, items: Snapshot) -> NDArray[np.int32]:
        """Rows of a release's items that it replaces or deletes, rising."""
        rows = items.lookup(self.items.ids())
        return np.sort(rows[rows >= 0])


def write_overlay(
    folder: Path,
    *,
    bundle_id: str,
    id_type: IdType,
    layout: ItemLayout,
    ids: Ids,
    records: NDArray[Any],
    deleted: Ids,
    watermark: int,
) -> Path:
    """Write an overlay into a folder; returns its path, whole or not there. It does not outlive a crash of the machine.

    ids: (r,) with records (r, item size), or rows (r, stride) uint8 of the layout; deleted: (d,), none of them among
    ids. Raises SnapshotError naming an item with a record that is not finite, or an id that comes twice.
    """
    path = folder / f"{watermark}-{len(ids)}.snap"
    zeros = np.zeros((len(deleted), layout.stride), np.uint8)
    with SnapshotWriter(path, kind="items", owner=bundle_id, id_type=id_type, layout=layout) as writer:
        for part, rows in ((ids, records), (deleted, zeros)):
            if len(part):
                writer.append(part, rows)
        writer.finish(durable=False)
    return path


def overlays_in(folder: Path) -> list[Path]:
    """The overlays of a folder, oldest first."""
    found: list[Any] = [(int(name[1]), path) for path in folder.glob("*.snap") if (name := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
