"""Python client of the RankTower pre-ranking service: RankTower blocks, AsyncRankTower awaits, both answer Ranking."""

from ranktower_client.client import AsyncRankTower, RankTower
from ranktower_client.errors import (
    BadAnswer,
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    RankTowerError,
    Unavailable,
)
from ranktower_client.wire import Query, Ranking, Release

__all__ = [
    "AsyncRankTower",
    "BadAnswer",
    "BadRequest",
    "DeadlineExceeded",
    "Overloaded",
    "Query",
    "RankTower",
    "RankTowerError",
    "Ranking",
    "Release",
    "Unavailable",
]
