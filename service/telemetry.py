"""Stage times and counters of the service, as Prometheus metrics and as the Server-Timing header."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import MutexValue, ValueClass

STAGES = ("queue", "decode", "encode", "user", "score", "topk", "respond")

STAGE_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
REQUEST_SECONDS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)
RELEASE_SECONDS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)  # few: there is a set for each release that took part
CANDIDATES = (0, 1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)

CHANGES = {
    "ranktower_watermark": "Position of the last change to the items that is served.",
    "ranktower_changed_items": "Items that are new, changed or deleted behind the release.",
    "ranktower_changes_behind_seconds": "For how long a change was not served or nobody could look for one; else 0.",
    "ranktower_dead_changes": "Items whose last change the bundle could not take, and entries that it could not read.",
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


class Compared(Protocol):
    """What `service.shadow` says of one ranking."""

    @property
    def overlap(self) -> Mapping[int, float]: ...
    @property
    def correlation(self) -> float | None: ...
    @property
    def missing(self) -> int: ...


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
        self._add_rollout(within)
        self._watermark, self._changed, self._behind, self._dead = (
            Gauge(name, text, multiprocess_mode="livemostrecent", **within) for name, text in CHANGES.items()
        )
        user_cache = Counter(
            "ranktower_user_cache_total", "Looks into the cache of user records, by result.", ["result"], **within
        )
        self.user_cache_hits, self.user_cache_misses = user_cache.labels("hit"), user_cache.labels("miss")
        self._serving: tuple[str, str] | None = None
        self._answers: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def _add_rollout(self, within: Any) -> None:
        """What is counted only while more than one release is live."""
        self._shares = Gauge(
            "ranktower_release_share",
            "Share of the users (current, canary) or of the requests (shadow) that a release has, 0 once it has none.",
            ["release", "role"],
            multiprocess_mode="livemax",
            **within,
        )
        self._refused = Gauge(
            "ranktower_release_refused",
            "1 for a canary or shadow that a worker does not serve, see /readyz for why.",
            ["release"],
            multiprocess_mode="livemax",
            **within,
        )
        self._rankings = Counter(
            "ranktower_release_rankings_total", "Rankings by release, while others are live.", ["release"], **within
        )
        self._release_seconds = Histogram(
            "ranktower_release_seconds",
            "Time in all stages of requests that one release answered, while others are live.",
            ["release"],
            buckets=RELEASE_SECONDS,
            **within,
        )
        pair = ["release", "against"]
        self._overlap = Summary(
            "ranktower_shadow_overlap", "Share of the best k that shadow and answer share.", [*pair, "k"], **within
        )
        self._correlation = Summary(
            "ranktower_shadow_rank_correlation", "Spearman's, of the items that were answered.", pair, **within
        )
        self._shadow_seconds = Summary(
            "ranktower_shadow_seconds", "Time that the shadow took for a ranking.", pair, **within
        )
        self._shadow_missing = Counter(
            "ranktower_shadow_missing_items_total", "Candidates that only the shadow does not know.", pair, **within
        )
        self.shadow_dropped = Counter(
            "ranktower_shadow_dropped_total", "Rankings that the shadow had no time for.", **within
        )
        self.shadow_failures = Counter(
            "ranktower_shadow_failures_total", "Rankings that the shadow could not answer.", **within
        )
        self._shown: set[tuple[str, str]] = set()
        self._shown_refused: set[str] = set()

    def show_shares(self, shares: Mapping[tuple[str, str], float], refused: set[str]) -> None:
        """shares: by release and role; what is not among them has none any more."""
        for pair in self._shown | shares.keys():
            self._shares.labels(*pair).set(shares.get(pair, 0.0))
        for release in self._shown_refused | refused:
            self._refused.labels(release).set(float(release in refused))
        self._shown |= shares.keys()
        self._shown_refused |= refused

    def observe_release(self, release: str, rankings: int) -> None:
        self._rankings.labels(release).inc(rankings)

    def observe_release_seconds(self, release: str, clock: StageClock) -> None:
        self._release_seconds.labels(release).observe(sum(clock.spent_ns.values()) / 1e9)

    def observe_shadow(self, release: str, against: str, found: Compared, seconds: float) -> None:
        pair = (release, against)
        for k, overlap in found.overlap.items():
            self._overlap.labels(*pair, str(k)).observe(overlap)
        if found.correlation is not None:
            self._correlation.labels(*pair).observe(found.correlation)
        if found.missing:
            self._shadow_missing.labels(*pair).inc(found.missing)
        self._shadow_seconds.labels(*pair).observe(seconds)

    def shadow_means(self, release: str) -> list[dict[str, Any]]:
        """What is known of a shadow beside each release that it stood against, of all workers together."""
        found: dict[str, dict[str, Any]] = {}
        sums: dict[tuple[str, str], dict[str, float]] = {}
        for family in self._collected().collect():
            if not family.name.startswith("ranktower_shadow_"):
                continue
            for sample in family.samples:
                if sample.labels.get("release") == release:
                    what = family.name.removeprefix("ranktower_shadow_")
                    what += f"@{sample.labels['k']}" if "k" in sample.labels else ""
                    end = sample.name.rpartition("_")[2]
                    sums.setdefault((sample.labels["against"], what), {})[end] = sample.value
        for (against, what), each in sums.items():
            told = found.setdefault(against, {"against": against, "rankings": 0, "missing_items": 0})
            if what == "missing_items":
                told["missing_items"] = int(each["total"])
            elif each["count"]:
                told[what] = {"mean": each["sum"] / each["count"], "count": int(each["count"])}
            if what == "seconds":
                told["rankings"] = int(each["count"])
        return [found[against] for against in sorted(found)]

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
        return generate_latest(self._collected())

    def _collected(self) -> CollectorRegistry:
        """The metrics of all workers."""
        if not self._shared:
            return self.registry
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return together
