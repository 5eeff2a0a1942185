"""What can be wrong with a request, or with the service when it comes. `problems.py` alone decides on HTTP status.

ServiceError                  carries `field` and `remedy` beside its message
    RequestError              the request cannot be answered as it was sent
        MalformedBody         the body is not a JSON document of the documented form
        UnsupportedBody       the body is of a type or encoding that nobody reads here
        BodyTooLarge          more octets than `max_body_bytes`
        RetrievalOff          the release has no index, or it was not loaded
        DeadlineExceeded      the time that the caller gave was over before scoring
    AdminOff                  an admin call to a service without a token
    Unauthorized              an admin call with another token
    ChangeRefused             what is live cannot be changed as an admin call asks
    StoreFailed               the store did not do what an admin call asked
    Busy                      the queue is full
    NotReady                  no release is loaded yet, or too few shards answer, or the service is going away
    ReleaseError              a release that does not fit together: the old one serves on
    SettingsError             a setting cannot be used
"""

# ruff: noqa: N818
from __future__ import annotations

from model.errors import RankTowerError


class ServiceError(RankTowerError):
    """Root: a sentence that names the thing and the value, the field it is about, and what to do."""

    def __init__(self, detail: str, *, field: str | None = None, remedy: str) -> None:
        super().__init__(f"{detail}: {remedy}")
        self.detail = detail
        self.field = field
        self.remedy = remedy


class RequestError(ServiceError):
    """The request cannot be answered as it was sent."""


class MalformedBody(RequestError):
    """The body is not a JSON document."""


class UnsupportedBody(RequestError):
    """The body is of a media type or content encoding that is not read here."""


class BodyTooLarge(RequestError):
    """The body has more octets than the service takes."""


class RetrievalOff(RequestError):
    """This service cannot search its catalogue."""


class DeadlineExceeded(RequestError):
    """The caller's deadline passed before the candidates were scored."""


class AdminOff(ServiceError):
    """There are no admin calls here."""


class Unauthorized(ServiceError):
    """The token of an admin call is wrong or missing."""


class ChangeRefused(ServiceError):
    """What is live cannot be changed so, as things stand."""


class StoreFailed(ServiceError):
    """The store did not do what was asked."""


class Busy(ServiceError):
    """As many requests wait as may wait."""

    def __init__(self, detail: str, *, remedy: str, retry_after_s: int) -> None:
        super().__init__(detail, remedy=remedy)
        self.retry_after_s = retry_after_s


class NotReady(ServiceError):
    """There is no release to answer from."""


class ReleaseError(ServiceError):
    """The parts of a release do not belong together."""


class SettingsError(ServiceError):
    """A setting has a value that cannot be used."""
