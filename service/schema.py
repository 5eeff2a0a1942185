"""The wire format on record: what the API documents and what any faster decoder must equal.

`wire.py` decodes and encodes on the request path; a test shows that it accepts, refuses and reads generated bodies
exactly as these models do. Null stands for an absent value wherever one may be left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ID_LENGTH = 1024  # characters of a string id; a snapshot holds none of more bytes
TOP_K = 100  # items of an answer, unless asked otherwise
PER_HEAD = 500  # items that each user head brings to a retrieval, unless asked otherwise
MAX_PER_HEAD = 10_000
DEADLINE_MS = 3_600_000  # the longest deadline


def _not_an_integer(value: Any) -> Any:
    if not isinstance(value, float):
        raise ValueError("not a fractional number")
    return value


Int64 = Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)]
Float = Annotated[float, BeforeValidator(_not_an_integer, json_schema_input_type=float), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=ID_LENGTH)]
Scalar = bool | Int64 | Float | str | None
Fields = dict[str, Scalar | list[Scalar]]
OnMissing = Literal["last", "drop", "error"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class UserBody(_Record):
    """Who asks."""

    user_id: Int64 | Text | None = Field(
        None, description="A known id fills the user's fields from the user table. Type: the release's `user_id_type`."
    )
    user: Fields | None = Field(
        None, description="Fields of the user by name, each in place of what the table holds; null is a missing value."
    )
    context: Fields | None = Field(None, description="Fields of this request by name (hour, device, scenario).")
    history: list[Int64] | list[Text] | None = Field(
        None, description="Ids of the items that the user took, oldest first, in place of what the table holds."
    )
    top_k: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = Field(
        None, description=f"Items to answer with, at most; {TOP_K} where absent."
    )
    explain: bool | None = Field(
        None,
        description="Say for each item which of its heads each user head chose; refused where the head is a graph.",
    )
    deadline_ms: Annotated[int, Field(ge=1, le=DEADLINE_MS)] | None = Field(
        None, description="Milliseconds after arrival within which scoring must have begun."
    )


class RankBody(UserBody):
    """Candidates to rank for one user."""

    candidates: list[Int64] | list[Text] = Field(description="Item ids, all of the release's `item_id_type`.")
    on_missing: OnMissing | None = Field(
        None,
        description="Items that the release does not know: `last` (default) appends them in your order with a null "
        "score, `drop` leaves them out, `error` refuses the request.",
    )


class BatchBody(_Record):
    """Several rankings in one request; all are answered, each by its user's release, or none."""

    requests: list[RankBody]


class RetrieveBody(UserBody):
    """A user, to find the best items of the whole catalogue for."""

    per_head: Annotated[int, Field(ge=1, le=MAX_PER_HEAD)] | None = Field(
        None, description=f"Items that each user head brings; their union is scored exactly. {PER_HEAD} where absent."
    )


class Explanation(_Record):
    """How a score came about, by user head."""

    item_heads: list[int] = Field(description="The item head that each user head chose.")
    similarities: list[float] = Field(description="Its similarity to that user head, before the scale.")


class RankedItem(_Record):
    """One item of an answer."""

    id: int | str
    score: float | None = Field(description="null for an item that the release does not know.")
    probability: float | None = Field(None, description="Calibrated; absent where the release has no calibration.")
    position: int | None = Field(None, description="Index in your candidates; absent when retrieved.")
    explanation: Explanation | None = Field(None, description="Present where asked for and the item is known.")


class Counts(_Record):
    """How many items came, were scored, and go back."""

    candidates: int
    scored: int
    returned: int


class RankAnswer(_Record):
    """The best items, best first; equal scores keep your order."""

    release: str
    watermark: int = Field(
        description="Position of the last change to the items that the answer knows; up to 2^63, so no double holds it."
    )
    user_known: bool | None = Field(description="Whether the user table knows `user_id`; null where none was sent.")
    items: list[RankedItem]
    missing: list[int] | list[str] = Field(description="Ids that the release does not know, in your order.")
    counts: Counts


class ShardState(_Record):
    """What became of the question to a shard."""

    shard: int
    release: str | None = Field(description="null where it has no part in the answer.")
    watermark: int | None
    candidates: int = Field(description="Candidates that it holds, known or not; when retrieved, those it found.")
    scored: int
    failure: str | None = Field(description="Why it has no part.")


class GatheredAnswer(RankAnswer):
    """As `ranktower gather` answers: `release` is the bundle that all scores are of, `watermark` the lowest."""

    partial: bool = Field(description="Whether a shard has no part, or has not scored all that it holds in time.")
    shards: list[ShardState] = Field(description="Those that were asked: none without candidates.")


class BatchAnswer(_Record):
    """The answers in the order of the requests."""

    release: str = Field(description="The current one; each ranking names the release that scored it.")
    rankings: list[RankAnswer]


class CanaryState(BaseModel):
    """A release that answers a share of the users."""

    release: str
    weight: float
    serving: bool = Field(description="Whether it answers here; while it does not, the current release does.")
    refused: str | None = Field(description="Why it does not.")


class ShadowState(BaseModel):
    """A release that scores a share of the requests beside the one that answers."""

    release: str
    share: float
    serving: bool
    refused: str | None
    compared: list[dict[str, Any]] = Field(
        [],
        description="Of all workers, by the release `against` which it stood: `rankings`, `missing_items`, and as "
        "`mean` and `count` each `overlap@10`, `overlap@50`, `overlap@100`, `rank_correlation`, `seconds`.",
    )


class RolloutState(BaseModel):
    """What is live beside the current release."""

    canaries: list[CanaryState]
    shadow: ShadowState | None


class ChangeBody(_Record):
    """What an admin call takes beside its verb."""

    release: str | None = Field(None, max_length=100, description="Not for rollback and abort; promote may go without.")
    weight: float | None = Field(None, description="Of a canary: share of the users from 0, which ends it, to below 1.")
    share: float | None = Field(None, description="Of a shadow: share of the requests from 0, which ends it, to 1.")


class LiveState(BaseModel):
    """What the store names as live."""

    current: str | None
    weights: dict[str, float] = Field(description="Share of the users by release, the current one first.")
    shadow: dict[str, Any] | None = Field(description="Its `release` and its `share` of the requests.")


class AuditedChange(BaseModel):
    """A change of what is live: who made it, and the shares by release before and after it."""

    at: str
    who: str
    verb: Literal["activate", "rollback", "canary", "shadow", "promote", "abort"]
    before: dict[str, float]
    after: dict[str, float]
    shadow_before: dict[str, float]
    shadow_after: dict[str, float]


class ChangeAnswer(BaseModel):
    """What an admin call has done; replicas follow within a second."""

    change: AuditedChange | None = Field(description="null where it was so already.")
    live: LiveState


class AdminAnswer(BaseModel):
    """What is live, how this replica serves it, and how it came about."""

    live: LiveState
    here: RolloutState
    changes: list[AuditedChange] = Field(description="The last 1,000, newest first.")


class Sample(_Record):
    """Ids drawn from the current release."""

    release: str
    items: list[int] | list[str]
    users: list[int] | list[str]


class ReleaseAnswer(_Record):
    """What is served."""

    model_config = ConfigDict(extra="allow")

    release: str
    watermark: int = Field(description="Position of the last change to the items that is served.")
    bundle: str
    snapshot: str
    created: str
    items: int = Field(description="Items of the catalogue.")
    users: int = Field(description="Users of the user table, 0 without one.")
    item_id_type: Literal["int", "string"]
    user_id_type: Literal["int", "string"]
    fields: dict[str, list[str]] = Field(description="Names of the fields that `user` and `context` take.")
    head: dict[str, Any]
    network: dict[str, Any]
    metrics: dict[str, Any]
    calibrated: bool
    retrieval: bool
    kernel: str = Field(description="What scores: a level of the kernel, or `onnxruntime` where the head is a graph.")
    rollout: RolloutState


class Alive(_Record):
    """The process answers."""

    alive: bool


class Ready(BaseModel):
    """State of this replica."""

    ready: bool
    release: str | None
    bundle: str | None
    kernel: str = Field(description="As in `/v1/release`; while no release is loaded, the kernel's level.")
    draining: bool
    users: str | None = Field(description="Version of the user table, null without one.")
    retrieval: bool = Field(description="Whether an index is loaded, so that /v1/retrieve answers.")
    rollout: RolloutState
    changes: dict[str, Any] = Field(
        description="What is known of the changes to items behind the release: `watermark`, the position of the last "
        "that is served, `items`: how many it changed, `behind_s`: for how long one has been in the log that is not "
        "served, and `dead`: how many the bundle could not take."
    )
    store: dict[str, Any] = Field(
        description="`url` without credentials, `reachable`, `staleness_s`: seconds since it last answered, `failure`: "
        "why the last attempt to take something over failed, and `failures`: how many did."
    )


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str = Field(description="A URN that names the kind of problem; docs/api.md lists them.")
    title: str
    status: int
    detail: str
    instance: str | None = None
    field: str | None = Field(description="Where in the request: `candidates[17]`, `user.age`; null for none.")
    remedy: str
