"""Stage times and counters of the service, as Prometheus metrics and as the Server-Timing header."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import MutexValue, ValueClass

STAGES = ("queue", "decode", "encode", "user", "score", "topk", "respond")

STAGE_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
REQUEST_SECONDS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)
CANDIDATES = (0, 1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)

CHANGES = {
    "ranktower_watermark": "Position of the last change to the items that is served.",
    "ranktower_changed_items": "Items that are new, changed or deleted behind the release.",
    "ranktower_changes_behind_seconds": "For how long a change has been in the log that is not served; 0 for none.",
    "ranktower_dead_changes": "Changes behind the release that its bundle could not take.",
}

SERVER_TIMING = ", ".join(f"{stage};dur=%.3f" for stage in STAGES)

disable_created_metrics()  # type: ignore[no-untyped-call]  # series without use that the documentation does not have


class StageClock:
    """Times the stages of one request: each lap gives the time since the last one to a stage."""

    __slots__ = ("_last_ns", "_spent_ns")

    def __init__(self) -> None:
        self._spent_ns = dict.fromkeys(STAGES, 0)
        self._last_ns = perf_counter_ns()

    def lap(self, stage: str) -> None:
        now_ns = perf_counter_ns()
        self._spent_ns[stage] += now_ns - self._last_ns
        self._last_ns = now_ns

    @property
    def spent_ns(self) -> dict[str, int]:
        """Nanoseconds by stage; every stage is there, 0 where no time went."""
        return dict(self._spent_ns)

    def header(self) -> str:
        """The value of Server-Timing, in milliseconds: `queue;dur=0.004, decode;dur=0.112, ...`."""
        return SERVER_TIMING % tuple([spent / 1e6 for spent in self._spent_ns.values()])


class Telemetry:
    """The metrics of one process. With several workers, prometheus-client adds them up through files (see settings)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._shared = ValueClass is not MutexValue  # set at import where PROMETHEUS_MULTIPROC_DIR is
        within: Any = {"registry": self.registry}
        self.requests = Counter(
            "ranktower_requests_total", "Requests answered, by route and status.", ["route", "status"], **within
        )
        self.request_seconds = Histogram(
            "ranktower_request_seconds", "Time to answer, by route.", ["route"], buckets=REQUEST_SECONDS, **within
        )
        stage_seconds = Histogram(
            "ranktower_stage_seconds", "Time in each stage of a request.", ["stage"], buckets=STAGE_SECONDS, **within
        )
        self._stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self.candidates = Histogram("ranktower_candidates", "Candidates of a ranking.", buckets=CANDIDATES, **within)
        self.missing = Counter("ranktower_missing_items_total", "Candidates that the release does not know.", **within)
        self.unknown_users = Counter(
            "ranktower_unknown_users_total", "Rankings for a user_id that the user table does not know.", **within
        )
        self.refresh_failures = Counter(
            "ranktower_refresh_failures_total", "Failed attempts to take a release or a user table over.", **within
        )
        self._releases = Gauge(
            "ranktower_release_info",
            "1 for the release that serves, 0 for those before it.",
            ["release", "bundle"],
            multiprocess_mode="livemax",
            **within,
        )
        self._staleness = Gauge(
            "ranktower_staleness_seconds",
            "Seconds since the store last answered this replica.",
            multiprocess_mode="livemostrecent",  # of the worker that is asked: those of others are from when they were
            **within,
        )
        self._watermark, self._changed, self._behind, self._dead = (
            Gauge(name, text, multiprocess_mode="livemostrecent", **within) for name, text in CHANGES.items()
        )
        user_cache = Counter(
            "ranktower_user_cache_total", "Looks into the cache of user records, by result.", ["result"], **within
        )
        self.user_cache_hits, self.user_cache_misses = user_cache.labels("hit"), user_cache.labels("miss")
        self._serving: tuple[str, str] | None = None
        self._answers: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def observe_answer(self, route: str, status: int, seconds: float) -> None:
        """Count one answer. Finding a metric by its labels costs as much as counting, so each pair is found once."""
        found = self._answers.get((route, status))
        if found is None:
            found = self.requests.labels(route, str(status)), self.request_seconds.labels(route)
            self._answers[route, status] = found
        found[0].inc()
        found[1].observe(seconds)

    def observe_stages(self, clock: StageClock) -> None:
        for stage, spent_ns in clock.spent_ns.items():
            self._stages[stage].observe(spent_ns / 1e9)

    def serve_release(self, release: str, bundle: str) -> None:
        if self._serving is not None:
            self._releases.labels(*self._serving).set(0)
        self._releases.labels(release, bundle).set(1)
        self._serving = (release, bundle)

    def serve_changes(self, watermark: int, changed: int, behind_s: float, dead: int) -> None:
        """What the release that serves knows of the changes behind it, told just before the metrics are."""
        self._watermark.set(watermark)
        self._changed.set(changed)
        self._behind.set(behind_s)
        self._dead.set(dead)

    def render(self, staleness_s: float | None) -> bytes:
        """All metrics in the Prometheus text format."""
        if staleness_s is not None:
            self._staleness.set(staleness_s)
        if not self._shared:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
