"""The admin calls: who may make them, what they ask of the store, and what they answer. Off without a token."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from pydantic import ValidationError

from cache.errors import RolloutRefused, StoreError, UnknownRelease
from cache.rollout import Change, Live, Verb, weights
from cache.store import open_store
from cache.watermarks import check_change
from service.errors import AdminOff, ChangeRefused, RequestError, StoreFailed, Unauthorized
from service.schema import ChangeBody
from service.settings import Settings

CALLER = "X-RankTower-Caller"
CALLER_LENGTH = 100
BODY_BYTES = 4096
VERBS: tuple[Verb, ...] = get_args(Verb)
WITHOUT_RELEASE = ("rollback", "abort")
SHARE_OF = {"canary": "weight", "shadow": "share"}


class Admin:
    """Changes what is live in the service's own store, with a connection of its own for each call."""

    def __init__(self, settings: Settings) -> None:
        self._token, self._url = settings.admin_token.encode(), settings.store

    def check(self, authorization: str) -> None:
        """Raise AdminOff where there is no token, Unauthorized unless this header (read as latin-1) has it."""
        if not self._token:
            raise AdminOff("the admin calls are off", remedy="start the service with RANKTOWER_ADMIN_TOKEN")
        kind, _, given = authorization.partition(" ")
        if not hmac.compare_digest(given.strip(" ").encode("latin-1"), self._token) or kind.lower() != "bearer":
            raise Unauthorized(
                "the token is wrong or missing", field="Authorization", remedy="send `Authorization: Bearer <token>`"
            )

    def change(self, verb: str, body: bytes, caller: str) -> dict[str, Any]:
        """`schema.ChangeAnswer`. Raises RequestError, ChangeRefused or StoreFailed; then nothing has changed."""
        change = read_change(verb, body)
        store = open_store(self._url)
        try:
            check_change(store, change)
            made = store.change(change, by=caller)
            return {"change": None if made is None else asdict(made), "live": tell_live(store.live())}
        except (RolloutRefused, UnknownRelease) as error:
            raise _refusal(ChangeRefused, error) from error
        except StoreError as error:
            raise _refusal(StoreFailed, error) from error
        finally:
            store.close()

    def audit(self) -> dict[str, Any]:
        """What is live, and the trail, newest first: `schema.AdminAnswer` without what the shadow found."""
        store = open_store(self._url)
        try:
            live, changes = store.live(), store.audit()
        except StoreError as error:
            raise _refusal(StoreFailed, error) from error
        finally:
            store.close()
        return {"live": tell_live(live), "changes": [asdict(change) for change in reversed(changes)]}


def read_change(verb: str, body: bytes) -> Change:
    """What a call asks for. Raises RequestError that names the field."""
    if verb not in VERBS:
        raise RequestError(f"{verb[:40]!r} is no verb", field="verb", remedy=f"use one of: {', '.join(VERBS)}")
    try:
        given = ChangeBody.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or None
        raise RequestError(f"{field or 'the body'}: {first['msg']}", field=field, remedy="see /openapi.json") from error
    if given.release is not None and verb in WITHOUT_RELEASE:
        raise RequestError(f"{verb} takes no release", field="release", remedy="leave it out, or use activate")
    share_of = SHARE_OF.get(verb)
    for name in ("weight", "share"):
        if getattr(given, name) is not None and name != share_of:
            raise RequestError(f"{verb} takes no {name}", field=name, remedy="leave it out")
    share = None if share_of is None else getattr(given, share_of)
    return Change(verb=verb, release=given.release, share=share)


def caller_of(headers: Mapping[str, str], address: str) -> str:
    """Who calls, by his own word, and from where, for the audit trail."""
    given = "".join(letter for letter in headers.get(CALLER, "") if letter.isprintable()).strip()
    return f"{given[:CALLER_LENGTH] or 'unnamed'}@{address} by admin call"


def tell_live(live: Live) -> dict[str, Any]:
    """`schema.LiveState`."""
    shadow = live.rollout.shadow
    return {
        "current": live.current,
        "weights": weights(live),
        "shadow": None if shadow is None else {"release": shadow.release, "share": shadow.share},
    }


def _refusal(kind: type[ChangeRefused | StoreFailed], error: StoreError) -> ChangeRefused | StoreFailed:
    detail, _, remedy = str(error).rpartition(": ")
    return kind(detail, remedy=remedy)
