"""Ids of items in bulk: an int64 array, or texts as one buffer with the place of each. No Python object an id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """UTF-8 texts that lie anywhere in one buffer, which may hold other things, too (a request's body, say)."""

    data: NDArray[np.uint8]  # (octets,)
    starts: NDArray[np.int64]  # (n,)
    sizes: NDArray[np.int64]  # (n,) octets

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Raises TypeError for what is not text, UnicodeEncodeError for half a character."""
        encoded = [text.encode() for text in texts] if not isinstance(texts, str) else None
        if encoded is None:
            raise TypeError("one text is not a list of texts")
        sizes = np.fromiter((len(text) for text in encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(sizes) - sizes, sizes)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: Any) -> Texts:
        """Those at the positions, a slice or an index array; the buffer is shared."""
        return Texts(self.data, np.ascontiguousarray(self.starts[which]), np.ascontiguousarray(self.sizes[which]))

    def tolist(self) -> list[str]:
        places = zip(self.starts.tolist(), (self.starts + self.sizes).tolist(), strict=True)
        return [bytes(self.data[start:end]).decode() for start, end in places]


Ids = NDArray[np.int64] | Texts
