"""Settings: from the environment and from flags, documented one by one, wrong ones named."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

from service.cli import gather, serve
from service.errors import SettingsError
from service.settings import PREFIX, GatherSettings, Settings, load_settings, unknown_variables

ROOT = Path(__file__).resolve().parents[2]


def test_flags_win_over_the_environment_and_it_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKTOWER_PORT", "9001")
    monkeypatch.setenv("RANKTOWER_RETRIEVAL", "true")
    settings = load_settings(port=9002, retrieval=None)
    assert (settings.port, settings.retrieval, settings.workers) == (9002, True, 1)


def test_every_setting_has_a_flag_and_a_description() -> None:
    assert {*inspect.signature(serve).parameters} == {*Settings.model_fields}
    assert all(field.description for field in Settings.model_fields.values())


def test_every_setting_of_gather_is_a_setting_with_a_description() -> None:
    flags = {*inspect.signature(gather).parameters}
    assert flags <= {*GatherSettings.model_fields}
    own = GatherSettings.model_fields.keys() - Settings.model_fields.keys()
    assert own <= flags
    assert all(GatherSettings.model_fields[name].description for name in own)
    documentation = (ROOT / "docs" / "operations.md").read_text()
    assert [name for name in own if f"`--{name.replace('_', '-')}`" not in documentation] == []


def test_every_setting_is_documented_with_its_default() -> None:
    documentation = (ROOT / "docs" / "api.md").read_text()
    rows = dict(re.findall(r"^\| `(RANKTOWER_\w+)` \| `(.*?)` \|", documentation, re.MULTILINE))
    expected = {f"{PREFIX}{name.upper()}": str(field.default) for name, field in Settings.model_fields.items()}
    assert rows == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"port": "x"}, "--port is 'x'"),
        ({"workers": 0}, "--workers is 0"),
        ({"log_level": "loud"}, "--log-level is 'loud'"),
    ],
)
def test_a_wrong_flag_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(named)):
        load_settings(**given)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKTOWER_INLINE_MS", "soon")
    with pytest.raises(SettingsError, match="RANKTOWER_INLINE_MS is 'soon'") as caught:
        load_settings()
    assert caught.value.field == "inline_ms"


def test_variables_that_are_no_settings_are_named_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKTOWER_MAX_QUEU", "3")
    monkeypatch.setenv("RANKTOWER_XYZZY", "3")
    monkeypatch.setenv("RANKTOWER_PORT", "9001")
    assert unknown_variables() == [
        ("RANKTOWER_MAX_QUEU", "did you mean RANKTOWER_MAX_QUEUE?"),
        ("RANKTOWER_XYZZY", "see ranktower serve --help"),
    ]


def test_workers_read_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        store="redis://somewhere", retrieval=True, inline_ms=3.5, port=1234, cache_dir=Path("elsewhere")
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ})  # what sharing sets ends with this block
        settings.share(tmp_path)
        assert load_settings() == settings
        assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8080"), ("0.0.0.0", "http://127.0.0.1:8080"), ("::1", "http://[::1]:8080")],
)
def test_the_url_is_one_that_can_be_opened(host: str, url: str) -> None:
    assert Settings(host=host).url == url
