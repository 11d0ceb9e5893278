"""Names of models: the demo, folders, the cache, and downloads through a fake of each SDK."""

from __future__ import annotations

import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from fastdeploy_lite.checkpoint.hub import is_complete, resolve_model
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

NAME = "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"
RENAMED = "PaddlePaddle/ERNIE-4.5-300B-A47B-2Bits-Paddle"
MODULES = {
    "AISTUDIO": "aistudio_sdk.snapshot_download",
    "MODELSCOPE": "modelscope.hub.snapshot_download",
    "HUGGINGFACE": "huggingface_hub",
}
EXTRAS = {"AISTUDIO": "aistudio", "MODELSCOPE": "modelscope", "HUGGINGFACE": "huggingface"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no SDK, and no network."""
    monkeypatch.setenv("FD_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FD_MODEL_SOURCE", raising=False)
    for module in MODULES.values():
        for part in (module, module.split(".")[0]):
            monkeypatch.setitem(sys.modules, part, None)

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "cache"


@pytest.fixture
def fake_sdk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Install a fake SDK; its calls are recorded and `action(local_dir)` plays the download."""

    def install(source: str, action: Callable[[Path], None]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def snapshot_download(**arguments: Any) -> str:
            calls.append(arguments)
            action(Path(arguments["local_dir"]))
            return str(arguments["local_dir"])

        monkeypatch.setenv("FD_MODEL_SOURCE", source)
        parts = MODULES[source].split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            module = types.ModuleType(name)
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules[MODULES[source]].snapshot_download = snapshot_download  # type: ignore[attr-defined]
        return calls

    return install


def download(folder: Path) -> None:
    write_tiny_model(folder, layers=1, vocab_size=64)


def test_demo_is_the_embedded_checkpoint(demo_dir: Path) -> None:
    assert resolve_model("demo") == demo_dir
    assert is_complete(demo_dir)


def test_folders_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "owner" / "model", layers=1, vocab_size=64)
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == Path("owner/model")


@pytest.mark.parametrize("name", ["/no/such", "./x", "one", "a/b/c", "a/..", "", "a/b\n", "~/x"])
def test_what_is_neither_folder_nor_repository(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        resolve_model(name)
    assert str(caught.value).isprintable()


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="give the folder"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("source", "repository", "revision"),
    [
        ("AISTUDIO", RENAMED, "master"),
        ("MODELSCOPE", RENAMED, "master"),
        ("HUGGINGFACE", NAME, "main"),
    ],
)
def test_downloads(cache: Path, fake_sdk: Any, source: str, repository: str, revision: str) -> None:
    calls = fake_sdk(source, download)
    folder = resolve_model(NAME)
    assert folder == cache / repository
    assert calls == [{"repo_id": repository, "revision": revision, "local_dir": str(folder)}]
    assert resolve_model(NAME) == folder
    assert len(calls) == 1  # the second time nothing is asked


def test_source_is_spelled_in_any_case(fake_sdk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_sdk("HUGGINGFACE", download)
    monkeypatch.setenv("FD_MODEL_SOURCE", "HuggingFace")
    resolve_model(NAME, "v1.2")
    assert calls[0]["revision"] == "v1.2"


def test_other_owners_are_not_renamed(cache: Path, fake_sdk: Any) -> None:
    calls = fake_sdk("AISTUDIO", download)
    assert resolve_model("baidu2/x", None) == cache / "baidu2" / "x"
    assert calls[0]["revision"] == "master"


def test_cache_under_the_given_name_is_found_without_sdk(cache: Path) -> None:
    folder = write_tiny_model(cache / NAME, layers=1, vocab_size=64)
    assert resolve_model(NAME) == folder


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.model", "shard", "rank"])
def test_incomplete_downloads_are_resumed(cache: Path, fake_sdk: Any, lost: str) -> None:
    folder = cache / RENAMED
    ranks = 2 if lost == "rank" else 1
    write_tiny_model(
        folder, layers=1, vocab_size=64, shard_bytes=1 << 16, tensor_parallel_size=ranks
    )
    assert is_complete(folder)
    if lost == "shard":
        next(folder.glob("*.safetensors")).unlink()
    elif lost == "rank":
        next((folder / "rank1").glob("*.safetensors")).unlink()
    else:
        (folder / lost).unlink()
    assert not is_complete(folder)
    calls = fake_sdk("AISTUDIO", lambda path: (path / "config.json").touch())
    assert resolve_model(NAME) == folder
    assert len(calls) == 1


def test_missing_sdk_says_what_to_install_and_where_it_looked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source, extra in EXTRAS.items():
        monkeypatch.setenv("FD_MODEL_SOURCE", source)
        with pytest.raises(CheckpointError) as caught:
            resolve_model(NAME)
        message = str(caught.value)
        assert f"fastdeploy-lite[{extra}]" in message
        assert str(cache / NAME) in message
        assert "FD_MODEL_SOURCE" in message


def test_no_network_says_what_to_do(cache: Path, fake_sdk: Any) -> None:
    def fail(_folder: Path) -> None:
        raise OSError("Name or service not known\n(retried 3 times)")

    fake_sdk("AISTUDIO", fail)
    with pytest.raises(CheckpointError) as caught:
        resolve_model(NAME)
    message = str(caught.value)
    assert message.isprintable()
    assert "Name or service not known" in message
    assert str(cache / RENAMED) in message
    assert f"aistudio download --model {RENAMED} --local_dir {cache / RENAMED}" in message


def test_an_empty_download_is_an_error(fake_sdk: Any) -> None:
    fake_sdk("MODELSCOPE", lambda folder: folder.mkdir(parents=True))
    with pytest.raises(CheckpointError, match=r"left no config\.json"):
        resolve_model(NAME)


def test_unknown_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_MODEL_SOURCE", "GITHUB")
    with pytest.raises(ConfigError, match="FD_MODEL_SOURCE: cannot use 'GITHUB'"):
        resolve_model(NAME)
    assert issubclass(ConfigError, ValueError)
