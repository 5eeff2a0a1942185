"""What can go wrong around a load test; what goes wrong inside one is counted in its report instead."""

from __future__ import annotations


class LoadTestError(Exception):
    """The run could not be made: names the thing, the value and the remedy."""


class SampleError(LoadTestError):
    """The service gave no ids to build requests from."""


class ServingError(LoadTestError):
    """The service under test did not come up or stay up."""


class ObjectiveError(LoadTestError):
    """The objectives cannot be read."""
