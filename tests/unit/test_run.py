"""What a process is started with; tests/integration/test_serve.py runs it."""

from __future__ import annotations

import socket

import pytest

from service.errors import SettingsError
from service.run import listen, log_config


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_refused_with_a_remedy(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"{host}:{port} cannot be listened on .* choose another"):
            listen(host, port)


def test_port_0_takes_a_free_one_that_workers_inherit() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0
        assert listener.get_inheritable()


def test_every_logger_writes_lines_of_one_form_at_the_chosen_level() -> None:
    config = log_config("warning")
    assert config["root"] == {"level": "WARNING", "handlers": ["stderr"]}
    assert config["disable_existing_loggers"] is False
