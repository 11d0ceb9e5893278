"""The names that scripts written for upstream import from `utils`."""

from __future__ import annotations

import argparse
import logging
import socket
from pathlib import Path

import pytest

from fastdeploy_lite import utils
from fastdeploy_lite.utils import (
    FlexibleArgumentParser,
    get_logger,
    get_random_port,
    is_port_available,
    retrive_model_from_server,
)
from fastdeploy_lite.utils.errors import CheckpointError


@pytest.mark.parametrize("name", utils.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(utils, name) is not None
    assert name in dir(utils)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = utils.nothing


def test_loggers_are_the_packages_own() -> None:
    assert utils.console_logger is get_logger("console")
    names = {getattr(utils, n).name for n in utils.__all__ if n.endswith("_logger") and n[0] != "g"}
    assert len(names) == 5
    assert all(isinstance(logging.getLogger(n), logging.Logger) for n in names)


def test_a_listening_port_is_not_available() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not is_port_available("127.0.0.1", port)
        assert not is_port_available("0.0.0.0", port)
    assert is_port_available("127.0.0.1", port)
    assert not is_port_available("no.such.host.invalid", port)


def test_a_random_port_can_be_bound() -> None:
    assert is_port_available("127.0.0.1", get_random_port())


def test_models_are_found_as_the_server_finds_them(demo_dir: Path, tmp_path: Path) -> None:
    assert retrive_model_from_server("demo") == str(demo_dir)
    assert retrive_model_from_server(str(tmp_path), revision="master") == str(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        retrive_model_from_server(str(tmp_path / "nothing"))


def test_the_parser_is_argparses() -> None:
    assert issubclass(FlexibleArgumentParser, argparse.ArgumentParser)
