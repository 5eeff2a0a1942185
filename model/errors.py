"""What can go wrong between a log and a bundle. Every message names the thing, the value and the remedy.

RankTowerError            anything a user can mend; the command line prints it and exits with 2
    DataError             a log: file, column, row
    SpecError             a feature specification or a network's options
        FeatureError      one value of one field cannot be encoded
    TrainError            a training run or its checkpoint
        DivergedError     the loss is no longer a number
    BundleError           a bundle on disk
"""

from __future__ import annotations


class RankTowerError(Exception):
    """Root of all errors that a user can mend."""


class DataError(RankTowerError):
    """A log is missing something or says something impossible."""


class SpecError(RankTowerError):
    """A feature specification or an option of a network is wrong."""


class FeatureError(SpecError):
    """One value of one field cannot be encoded."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.detail = message


class TrainError(RankTowerError):
    """A training run cannot start, go on or be read back."""


class DivergedError(TrainError):
    """The loss is no longer a finite number: the learning rate was too high."""


class BundleError(RankTowerError):
    """A bundle is incomplete, changed, or of another format."""
