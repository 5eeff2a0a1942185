"""Settings of the service: `RANKTOWER_*` in the environment, or the flag of `ranktower serve` of the same name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from kernel import engine
from kernel.errors import KernelError
from service.errors import SettingsError

PREFIX = "RANKTOWER_"
Loaded = TypeVar("Loaded", bound=BaseSettings)


class KernelSettings(BaseSettings):
    """What every verb that scores or packs obeys, not `serve` alone."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    kernel: Literal["auto", "avx512-vnni", "avx512", "avx2", "portable", "numpy"] = Field(
        default="auto", description="Level of the scoring kernel; auto takes the best that this processor has."
    )
    require_native: bool = Field(
        default=False, description="Refuse to start where only the NumPy reference could score."
    )

    def choose_kernel(self) -> str:
        """Select the level of this process; returns its name. Raises SettingsError where it cannot be had."""
        better = self.kernel == "avx512" and "avx512-vnni" in engine.levels()
        try:
            return engine.select("avx512-vnni" if better else self.kernel, require_native=self.require_native)
        except KernelError as error:
            detail, _, remedy = str(error).rpartition(": ")
            raise SettingsError(detail, field="kernel", remedy=remedy) from error


class Settings(KernelSettings):
    """Every setting with its default. Flags win over the environment."""

    store: str = Field(default="file://./var/releases", description="URL of the release store.")
    cache_dir: Path = Field(default=Path("var/cache"), description="Folder for what remote stores send.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: int = Field(default=1, ge=1, le=1024, description="Processes; all map the same files.")
    retrieval: bool = Field(default=False, description="Load the release's index and answer /v1/retrieve.")
    max_candidates: int = Field(default=20_000, ge=1, description="Most candidates of one ranking.")
    max_batch: int = Field(default=64, ge=1, description="Most rankings of one batch.")
    max_body_bytes: int = Field(default=8 << 20, ge=1, description="Largest body.")
    max_in_flight: int = Field(default=4, ge=1, description="Requests at work at the same time, by worker.")
    max_queue: int = Field(default=256, ge=1, description="Requests waiting for that; more are refused with 429.")
    pool_threads: int = Field(default=2, ge=1, le=256, description="Threads for requests too large for the event loop.")
    inline_ms: float = Field(
        default=2.0, ge=0, description="Estimated work up to which a request runs on the event loop."
    )
    user_cache: int = Field(default=0, ge=0, description="Outputs of the user tower to keep, by worker; 0 for none.")
    huge_pages: bool = Field(
        default=True, description="Read items into huge pages where the system has them for files."
    )
    refresh_s: float = Field(default=1.0, gt=0, description="Longest time between two looks at the store.")
    drain_s: float = Field(default=1.0, ge=0, description="After SIGTERM, unready but answering for so long.")
    admin_token: str = Field(
        default="", repr=False, description="Token of the admin calls; without one there are none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least that is logged.")

    @property
    def url(self) -> str:
        """Where a browser on this machine finds the service."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def share(self, metrics: Path) -> None:
        """Hand these settings to worker processes, which read the environment and add up their metrics in a folder."""
        for name in type(self).model_fields:
            os.environ[f"{PREFIX}{name.upper()}"] = str(getattr(self, name))
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else each of N workers starts a thread for every core
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)


class GatherSettings(Settings):
    """What `ranktower gather` takes beside that: of a catalogue in shards on Ray Serve."""

    shards: int = Field(default=4, ge=1, le=1024, description="How many shards the catalogue was published in.")
    replicas: int = Field(default=1, ge=1, le=1024, description="Replicas of each shard.")
    replica_cpus: float = Field(default=0.0, ge=0, description="Processors that Ray keeps for a replica of a shard.")
    deadline_ms: int = Field(default=1000, ge=1, le=3_600_000, description="deadline_ms of requests without one.")
    partial: bool = Field(default=True, description="Answer from the shards that answer; else such a request gets 503.")
    ray_address: str = Field(
        default="local",
        description="host:port of the Ray cluster that this node is part of; local starts one of this machine alone.",
    )


def unknown_variables() -> list[tuple[str, str]]:
    """Each `RANKTOWER_*` of the environment that is no setting, with what to do about it."""
    known = [name.upper() for name in Settings.model_fields]
    found = []
    for name in sorted(os.environ):
        setting = name.upper().removeprefix(PREFIX)
        if name.upper().startswith(PREFIX) and setting not in known:
            close = difflib.get_close_matches(setting, known, n=1)
            found.append((name, f"did you mean {PREFIX}{close[0]}?" if close else "see ranktower serve --help"))
    return found


def load_settings(**given: Any) -> Settings:
    """Flags (None where not given) over the environment. Raises SettingsError naming the first wrong one."""
    return _load(Settings, given)


def load_gather_settings(**given: Any) -> GatherSettings:
    """The same for `ranktower gather`."""
    return _load(GatherSettings, given)


def load_kernel_settings() -> KernelSettings:
    """What the environment says of the kernel. Raises SettingsError naming the first wrong one."""
    return _load(KernelSettings, {})


def _load(kind: type[Loaded], given: Mapping[str, Any]) -> Loaded:
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        source = f"--{name.replace('_', '-')}" if given.get(name) is not None else f"{PREFIX}{name.upper()}"
        shown = repr(first["input"]) if kind.model_fields[name].repr else "not shown here"
        raise SettingsError(
            f"{source} is {shown}", field=name, remedy=first["msg"][0].lower() + first["msg"][1:]
        ) from error
