"""Find real data sets, which are never part of this project, for the tests that read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# a folder with one folder a data set: named by the environment, else shared/data beside the checkout
FOLDER = Path(os.environ.get("TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where the folder of a data set is absent."""
    return pytest.mark.skipif(not (FOLDER / name).is_dir(), reason=f"no {name} data: TEST_DATA names no folder with it")
