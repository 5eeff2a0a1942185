"""Fill a folder beside its place, then put it there: a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from model.errors import RankTowerError


class replacing_folder:
    """`with replacing_folder(out, mark) as temporary:` fills a sibling of `out`, then puts it in out's place.

    An existing `out` is replaced only if it holds the file `mark`, that is, if it is one of ours. On an error the
    temporary folder goes and `out` stays as it was.
    """

    def __init__(self, out: Path, mark: str) -> None:
        self.out, self.mark = out, mark

    def __enter__(self) -> Path:
        ours = (self.out / self.mark).is_file() or (self.out.is_dir() and not any(self.out.iterdir()))
        if self.out.exists() and not ours:
            raise RankTowerError(f"{self.out} exists and holds no {self.mark}: choose another folder or remove it")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        self.temporary.chmod(0o755)
        old = self.temporary.with_name(self.temporary.name + ".old")
        if self.out.exists():
            os.rename(self.out, old)
        os.rename(self.temporary, self.out)
        shutil.rmtree(old, ignore_errors=True)
