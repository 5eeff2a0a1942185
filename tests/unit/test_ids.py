"""Texts in one buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel.ids import Texts


@given(st.lists(st.text(max_size=8), max_size=20))
def test_texts_come_out_as_they_went_in(texts: list[str]) -> None:
    packed = Texts.of(texts)
    assert len(packed) == len(texts)
    assert packed.tolist() == texts
    assert packed[::-1].tolist() == texts[::-1]
    assert packed[np.arange(len(texts))[1:]].tolist() == texts[1:]


@pytest.mark.parametrize("wrong", ["abc", [1], [None], [b"a"]])
def test_what_is_not_text_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, AttributeError)):
        Texts.of(wrong)
    with pytest.raises(UnicodeEncodeError):
        Texts.of(["\ud800"])
