"""Write a log in the documented form: whole or not at all, never over what someone else put there or changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from model.datasets.schema import FILE, read_schema
from model.errors import DataError
from model.features import Field

MARK = "source.json"  # says that we wrote the folder, from what, and what each file was
TABLES = ("users", "items", "events")

log = logging.getLogger(__name__)


Rows: TypeAlias = (
    pa.Table | Iterable[pa.Table]
)  # whole, or in blocks of one schema where the whole would not fit into memory


@dataclass(frozen=True, kw_only=True)
class Form:
    """A log ready to be written."""

    users: Rows
    items: Rows
    events: Rows
    document: str  # the text of log.toml
    beside: Mapping[str, str] = field(default_factory=dict)  # further text files by name, which no reader of logs needs


def write_form(out: Path, *, adapter: str, sources: Sequence[Path], build: Callable[[], Form]) -> Path:
    """Write what `build` returns into the folder `out` and return it; `adapter` names the data set and its version.

    What was written before from the same sources stays as it is, edits of log.toml included. A folder that we did not
    write, or that changed since and would be replaced, is refused.
    """
    fingerprint = _fingerprint(adapter, sources)
    if _is_settled(out, fingerprint):
        return out
    form = build()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _write_files(partial, form, adapter, fingerprint)
        _put_in_place(partial, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error}): make room, or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%s: wrote the %s log", out, adapter)
    return out


def fields_as_toml(fields: Iterable[Field]) -> str:
    """The [[fields]] of log.toml, with the options that differ from their defaults."""
    return "".join(f"\n[[fields]]\n{_options(field)}" for field in fields)


def _options(field: Field) -> str:
    optional = {"length": field.length if field.is_list else None, "shares": field.shares}
    values = {"name": field.name, "side": field.side, "kind": field.kind, "dim": field.dim, **optional}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None)


def _fingerprint(adapter: str, sources: Iterable[Path]) -> str:
    """Hash of the adapter's version and of the content of every source."""
    digest = hashlib.sha256(adapter.encode())
    for path in sources:
        try:
            digest.update(_hash(path).encode())
        except FileNotFoundError as error:
            raise DataError(f"{path} does not exist: give the folder that holds it") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}): give a file that can") from error
    return digest.hexdigest()


def _is_settled(out: Path, fingerprint: str) -> bool:
    """Whether nothing is left to do. Raises DataError where writing would destroy something."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    mark = _read_mark(out)
    hashes: dict[str, str] = mark["files"]
    changed = sorted(name for name, known in hashes.items() if (out / name).exists() and _hash(out / name) != known)
    missing = [name for name in hashes if not (out / name).exists()]
    if mark["fingerprint"] == fingerprint and not missing:
        if changed:
            log.warning("%s: keeping %s as edited", out, ", ".join(changed))
        return True
    foreign = sorted(path.name for path in out.iterdir() if path.name not in {*hashes, MARK})
    if changed or foreign:
        raise DataError(
            f"{out} must be written anew, but {', '.join(changed + foreign)} was changed or added there: "
            "move the folder away or choose another one"
        )
    return False


def _read_mark(out: Path) -> dict[str, Any]:
    try:
        mark = json.loads((out / MARK).read_text(encoding="utf-8"))
        if isinstance(mark["files"], dict) and isinstance(mark["fingerprint"], str):
            return dict(mark)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("%s: no readable %s: %s", out, MARK, error)
    raise DataError(f"{out} exists and was not written by `ranktower data`: choose another folder, or move it away")


def _write_files(folder: Path, form: Form, adapter: str, fingerprint: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in TABLES:
        _write_rows(folder / f"{name}.parquet", getattr(form, name))
    for name, text in {**form.beside, FILE: form.document}.items():
        (folder / name).write_text(text, encoding="utf-8")
    read_schema(folder / FILE)
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir())}
    mark = {"adapter": adapter, "fingerprint": fingerprint, "files": hashes}
    (folder / MARK).write_text(json.dumps(mark, indent=1), encoding="utf-8")


def _write_rows(path: Path, rows: Rows) -> None:
    if isinstance(rows, pa.Table):
        pq.write_table(rows, path, compression="zstd")
        return
    blocks = iter(rows)
    first = next(blocks)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(block)


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was there before is put back should that fail."""
    if not out.exists():
        partial.rename(out)
        return
    replaced = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    out.rename(replaced)
    try:
        partial.rename(out)
    except OSError:
        replaced.rename(out)
        raise
    shutil.rmtree(replaced)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
