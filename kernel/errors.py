"""What the kernel refuses.

KernelError               a head, a level or an array that no kernel takes
    RecordError           an item record that holds NaN, an infinity, or a number beyond its dtype
"""

from __future__ import annotations


class KernelError(ValueError):
    """A sentence that names the thing, the value and what to do."""


class RecordError(KernelError):
    """`row` is the first record that cannot be packed."""

    def __init__(self, row: int, dtype: str) -> None:
        super().__init__(f"record {row} holds NaN, an infinity, or a number that {dtype} cannot hold")
        self.row = row
