"""Flags of the HTTP side: what is refused, what is named, what is hidden."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.server_args import (
    ServerArgs,
    add_arguments,
    server_args,
)
from fastdeploy_lite.utils import ports
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError, explain
from fastdeploy_lite.utils.ports import in_url, listen, reserve


def parse(*flags: str) -> ServerArgs:
    parser = FlexibleArgumentParser(prog="serve")
    add_arguments(parser)
    return server_args(parser.parse_args(list(flags)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--api-key", ""), "api_key is empty"),
        (("--api-key", "a", "--api-key", " "), "api_key is empty"),
        (("--ssl-keyfile", "/nonexistent"), "ssl_keyfile needs ssl_certfile"),
        (("--ssl-ca-certs", "/nonexistent"), "ssl_ca_certs needs ssl_certfile"),
        (("--ssl-certfile", "/nonexistent"), "no file '/nonexistent'"),
        (("--ssl-certfile", __file__), "cannot be used"),
        (("--allowed-origins", "*", "--allow-credentials"), "named allowed_origins"),
        (("--root-path", "x"), "must start with /"),
        (("--max-waiting-time", "-2"), "max_waiting_time"),
        (("--workers", "0"), "workers"),
        (("--port", "65536"), "port"),
        (("--metrics-port", "-1"), "metrics_port"),
        (("--controller-port", "-7"), "controller_port"),
        (("--max-concurrency", "0"), "max_concurrency"),
    ],
)
def test_values_that_make_no_sense_are_refused(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(*flags)


@pytest.mark.parametrize("content", ["api_key: []", "api_key: ['']", "api_key: ['', a]"])
def test_yaml_opens_no_door(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match="api_key"):
        parse("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("value", ["", ",", " , "])
def test_a_variable_without_keys_opens_no_door(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FD_API_KEY", value)
    with pytest.raises(ConfigError, match="FD_API_KEY"):
        parse()
    assert parse("--api-key", "flag").api_key == ["flag"]


def test_keys_on_the_command_line_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over the file's, and those over the variable's: never a union."""
    monkeypatch.setenv("FD_API_KEY", "old,older")
    (tmp_path / "c.yaml").write_text("api_key: [file]")
    file = ("--config", str(tmp_path / "c.yaml"))
    assert parse().api_key == ["old", "older"]
    assert parse(*file).api_key == ["file"]
    assert parse("--api-key", "a", "--api-key", "b").api_key == ["a", "b"]
    assert parse(*file, "--api-key", "a").api_key == ["a"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("FD_LITE_SEND_SECONDS", "soon"), ("FD_LITE_SEND_SECONDS", "0"), ("FD_LOG_LEVEL", "LOUD"),
     ("FD_TRACE", "yes"), ("FD_LITE_MAX_BODY_BYTES", "-1"), ("FD_LITE_LOG_FORMAT", "xml")],
)  # fmt: skip
def test_variables_are_refused_before_they_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        envs.snapshot()


@pytest.mark.parametrize(
    ("text", "origins"),
    [("*", ["*"]), ('["http://a", "http://b"]', ["http://a", "http://b"]),
     ("http://a, http://b", ["http://a", "http://b"])],
)  # fmt: skip
def test_origins_in_three_spellings(text: str, origins: list[str]) -> None:
    assert parse("--allowed-origins", text).allowed_origins == origins


def test_what_does_nothing_is_named() -> None:
    lines = parse("--workers", "3", "--timeout", "9", "--enable-mm-output", "--max-concurrency",
                  "99999", "--allow-credentials").without_effect()  # fmt: skip
    for flag in ("workers", "timeout", "enable-mm-output", "max-concurrency", "allow-credentials"):
        assert any(flag in line for line in lines)
    assert parse().without_effect() == []


def test_secrets_are_not_shown() -> None:
    shown = str(parse("--api-key", "hunter2").shown())
    assert "hunter2" not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    ("host", "words"),
    [("192.0.2.1", "no such address"), ("nowhere.invalid", "cannot be resolved"),
     ("a" * 300, "cannot be resolved")],
)  # fmt: skip
def test_only_a_busy_port_is_called_busy(host: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        reserve("port", host, 0)
    assert "in use" not in str(caught.value)


def test_an_address_of_another_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_is_listening", lambda *_: True)  # as behind a proxy
    with pytest.raises(ConfigError, match="no such address"):
        reserve("port", "192.0.2.1", 8000)
    with pytest.raises(ConfigError, match="already in use"):
        reserve("port", "127.0.0.1", 0)


def test_a_port_that_waits_for_its_model_is_taken() -> None:
    """Two servers that loaded at a time both had it: the slower one ended with status 0."""
    with reserve("port", "127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match="already in use"):
            reserve("port", "127.0.0.1", port)
        with pytest.raises(ConfigError, match="already in use"):
            reserve("port", "0.0.0.0", port)
        listen("port", first, 4)
        with pytest.raises(ConfigError, match="already in use"):
            reserve("port", "127.0.0.1", port, probe=False)


def test_a_restart_waits_for_no_old_connection() -> None:
    with reserve("port", "127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        listen("port", first, 4)
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = first.accept()
            accepted.close()  # first, so that it is this end that stays in TIME_WAIT
            assert client.recv(1) == b""
    with reserve("port", "127.0.0.1", port) as second:
        listen("port", second, 4)


@pytest.mark.parametrize("other", ["--port", "--metrics-port"])
def test_ports_of_one_server_differ(other: str) -> None:
    with pytest.raises(ConfigError, match=r"controller_port 8123 is (port|metrics_port), too"):
        parse("--controller-port", "8123", other, "8123")
    assert parse("--controller-port", "0", "--port", "0", "--metrics-port", "0").port == 0


def test_addresses_in_urls() -> None:
    assert [in_url(host) for host in ("::1", "localhost")] == ["[::1]", "localhost"]
    with pytest.raises(ConfigError, match=r"cannot bind \[2001:db8::1\]:8000"):
        reserve("port", "2001:db8::1", 8000)


def test_an_explanation_begins_with_what_helps() -> None:
    cause = ModuleNotFoundError("No module named 'aistudio_sdk'")
    error: Any = FastDeployError("pip install aistudio-sdk")
    error.__cause__ = cause
    assert explain(error) == (
        "pip install aistudio-sdk (because of ModuleNotFoundError: No module named 'aistudio_sdk')"
    )
    quoting = FastDeployError(f"x cannot be read: {cause}")
    quoting.__cause__ = cause
    assert explain(quoting).count("aistudio_sdk") == 1
