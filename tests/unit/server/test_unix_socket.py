"""Unix sockets: taken before a model loads, left by nobody, and never taken from somebody."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_lite.entrypoints.openai.server_args import ServerArgs
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.unix_socket import reserve_path


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Short: the kernel takes 107 bytes."""
    yield tmp_path_factory.mktemp("s") / "s"


def test_a_path_is_bound_opened_and_removed(path: Path) -> None:
    taken = reserve_path(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    with socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        taken.listen(8)
        client.connect(str(path))
    taken.close()
    taken.close()
    assert not path.exists()


def test_relative_paths_count_from_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    taken = reserve_path("s")
    monkeypatch.chdir("/")
    taken.close()
    assert not path.exists()


def test_the_socket_of_a_process_that_is_gone_is_taken_over(path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    assert path.exists()
    reserve_path(str(path)).close()


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "still loading"])
def test_the_socket_of_somebody_else_is_left_alone(path: Path, is_open: bool) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        if is_open:
            other.listen(1)
        for _ in range(3):  # its queue of connections may be full
            with pytest.raises(ConfigError, match=rf"^uds: '{path}' is already in use$"):
                reserve_path(str(path))
        assert path.exists()


def test_a_file_is_not_removed(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        reserve_path(str(path))
    assert path.read_text() == "precious"
    link = path.with_name("l")
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="exists and is no socket"):
        reserve_path(str(link))


def test_what_took_its_place_meanwhile_is_left_alone(path: Path) -> None:
    taken = reserve_path(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        taken.close()
        assert path.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no/such/folder", "its folder does not exist"),
        ("x" * 200, "AF_UNIX path too long"),
        ("a\0b", "null"),
    ],
)
def test_a_path_that_cannot_be_bound_is_one_line(path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^uds: cannot bind '.*: .*{reason}") as caught:
        reserve_path(str(path.parent / name))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_without_permission_is_said(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            reserve_path(str(path))
    finally:
        path.parent.chmod(0o700)


def test_host_and_port_do_not_matter_beside_a_socket() -> None:
    args = ServerArgs(uds="/run/s", metrics_port=8000, controller_port=8001)
    args.port = 8001
    args.check()
    assert not args.shares_metrics
    assert ServerArgs(uds="/run/s").shares_metrics
    with pytest.raises(ConfigError, match="uds is empty"):
        ServerArgs(uds=" ").check()
