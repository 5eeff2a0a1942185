"""How much of the log of changes each release contains: found at publish, kept in manifests, the bound of trimming."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cache.changes import CHANGES, DEAD, ChangeLog, Entry, decode_dead, decode_embedded, records_log
from cache.errors import StoreError
from cache.rollout import Change
from cache.store import ReleaseStore

READ_ENTRIES = 16  # at a time
EXPORT_S = (
    3_600.0  # how long before its time of writing an items file may have been begun, unless something better is known
)
SKEW_S = 60.0  # by so much the clock of who wrote an items file may be ahead of the log's


def watermark_of(store: ReleaseStore, items: Path, given: int | None) -> int:
    """The position up to which an items file contains the log: of an hour before it was written, unless one is given.

    What the file contains beyond it is applied once more; but nothing that every live release contains already. Raises
    StoreError for one beyond the log, or one behind which entries were trimmed, and for a file from the future.
    """
    log = store.log(CHANGES)
    last = log.last()
    if given is not None and not 0 <= given <= last:
        raise StoreError(
            f"--watermark {given} is not in the log of {store.url}, which ends at {last}: give an earlier one"
        )
    if last == 0:
        return 0
    watermark = _before_export(log, items) if given is None else given
    written = "" if given is not None else f", written at {_time(items.stat().st_mtime)}"
    check_watermark(store, watermark, f"{items}{written}")
    return watermark


def _before_export(log: ChangeLog, items: Path) -> int:
    written_ms, now_ms = items.stat().st_mtime_ns // 1_000_000, log.now_ms()
    if written_ms > now_ms + 1000 * SKEW_S:  # what it contains of the log cannot be known: too much is soon taken
        raise StoreError(
            f"{items} was written at {_time(written_ms / 1000)}, by the clock of the log it is {_time(now_ms / 1000)} "
            "now: set the clocks and the file's time (touch), or give --watermark with the position before the export"
        )
    contained = min(log.floor(), log.position_at(written_ms))
    return max(contained, log.position_at(written_ms - int(EXPORT_S * 1000)))


def check_watermark(store: ReleaseStore, watermark: int, what: str) -> None:
    """Raise StoreError where entries that `what` does not contain may be gone, or its watermark is of another log.

    A log only grows, so what was built for it never has a watermark beyond its end; an empty one takes 0 alone.
    """
    log = store.log(CHANGES)
    floor, end = log.floor(), log.last()
    if watermark < floor:
        raise StoreError(
            f"{what} contains the changes up to position {watermark}, {store.url} has trimmed its log up to {floor}: "
            f"export the items again and publish them (with --watermark {floor} if they contain those changes)"
        )
    if watermark > end:
        raise StoreError(
            f"{what} contains the changes up to position {watermark}, the log of {store.url} ends at {end}, so it was "
            "built for another store or that log was lost: publish the items again"
        )


def check_change(store: ReleaseStore, change: Change) -> None:
    """The same of the release that a change names, where it may become live."""
    if change.share == 0:
        return
    for info in store.list():
        if info.id == change.release and not info.damage:
            check_watermark(store, info.watermark, f"release {info.id}")


def lowest_watermarks(store: ReleaseStore) -> dict[str, int]:
    """The lowest watermark of the live releases of each bundle. A damaged release is none: nobody can serve it."""
    lowest: dict[str, int] = {}
    for info in store.list():
        if not info.damage:
            lowest[info.bundle_id] = min(info.watermark, lowest.get(info.bundle_id, info.watermark))
    return lowest


def trim_changes(store: ReleaseStore) -> int | None:
    """Trim what every live release contains from all logs; returns up to where, None where there is nothing to trim.

    A release may be published meanwhile with a watermark below the others'. Floors are raised before releases are
    counted for good; publishers and updaters look at floors after the release can be seen: one of both sees the other.
    """
    raw = store.log(CHANGES)
    lowest = lowest_watermarks(store)
    end = raw.last()
    if not lowest or not end or max(lowest.values()) > end:  # one beyond the end says nothing of this log
        return None
    raw.raise_floor(min(lowest.values()))
    for bundle_id, watermark in lowest.items():
        store.log(records_log(bundle_id)).raise_floor(watermark)
    lowest = lowest_watermarks(store)
    if not lowest:
        return None
    contained = min(lowest.values())
    raw.trim(contained)
    for name in store.logs("records"):
        if name not in map(records_log, lowest_watermarks(store)):
            store.delete_log(name)
    for bundle_id, watermark in lowest.items():
        _trim_while(store.log(records_log(bundle_id)), partial(_is_until, watermark))
    _trim_while(store.log(DEAD), lambda entry: all(letter.position <= contained for letter in decode_dead(entry)))
    return contained


def _trim_while(log: ChangeLog, contained: Callable[[Entry], bool]) -> None:
    """Trim the entries before the first that is not contained."""
    position = 0
    while entries := log.read(position, READ_ENTRIES):
        for entry in entries:
            if not contained(entry):
                log.trim(position)
                return
            position = entry.position
    log.trim(position)


def _is_until(watermark: int, entry: Entry) -> bool:
    return decode_embedded(entry).until <= watermark


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
