"""From the name of a model to a folder: the embedded demo, a local folder, or a download.

Downloads go through the hub's own SDK (an optional extra, imported only when needed), chosen by
`FD_MODEL_SOURCE`, into `FD_MODEL_CACHE` (default: the home directory) / repository id, as with
FastDeploy.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint.location import find_weight_files, rank_numbers
from fastdeploy_lite.utils.errors import CheckpointError, quote

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class _Source:
    """One hub: its SDK's module, our extra, the shell command, and what it calls things."""

    module: str
    package: str
    extra: str
    command: str
    owner_of_baidu: str
    revision_of_master: str


_SOURCES = {
    "AISTUDIO": _Source(
        "aistudio_sdk.snapshot_download",
        "aistudio-sdk",
        "aistudio",
        "aistudio download --model {id} --local_dir {dir}",
        "PaddlePaddle",
        "master",
    ),
    "MODELSCOPE": _Source(
        "modelscope.hub.snapshot_download",
        "modelscope",
        "modelscope",
        "modelscope download --model {id} --local_dir {dir}",
        "PaddlePaddle",
        "master",
    ),
    "HUGGINGFACE": _Source(
        "huggingface_hub",
        "huggingface-hub",
        "huggingface",
        "hf download {id} --local-dir {dir}",
        "baidu",
        "main",
    ),
}


def resolve_model(name: str, revision: str | None = "master") -> Path:
    """Return the folder of model `name`.

    `demo` is the embedded checkpoint (`./demo` a folder of that name); an existing folder is
    returned as it is; anything of the form `owner/model` is looked up in the cache and downloaded
    if it is not there or not complete. Raises CheckpointError saying where it looked and what to
    do, ConfigError for an unknown FD_MODEL_SOURCE.
    """
    if name == "demo":
        return demo_path()
    local = Path(name).expanduser()
    if name and local.is_dir():  # an empty name would be the working directory
        return local
    if local.is_file():
        raise CheckpointError(f"model {quote(name)} is a file; give the folder that holds it")
    if not _REPOSITORY_ID.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"model {quote(name)}: no such folder (looked in {local.absolute()}), and not a"
            " repository id of the form owner/model"
        )
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    source_name, source = _source()
    owner, model = name.split("/")
    repository = f"{source.owner_of_baidu}/{model}" if owner == "baidu" else name
    cache = Path(envs.FD_MODEL_CACHE or Path.home()).expanduser()
    target = cache / repository
    looked_in = list(dict.fromkeys([cache / name, target]))
    for folder in looked_in:
        if is_complete(folder):
            return folder
    if revision in (None, "", "master"):
        revision = source.revision_of_master
    advice = _advice(name, repository, target, source, looked_in)
    try:
        _downloader(source, advice)(repo_id=repository, revision=revision, local_dir=str(target))
    except CheckpointError:
        raise
    except Exception as error:  # SDKs raise whatever their HTTP library raises
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{repository} could not be downloaded from {source_name} ({reason}). {advice}"
        ) from error
    if not (target / "config.json").is_file():
        raise CheckpointError(f"{target}: the download from {source_name} left no config.json")
    return target


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds config.json, a tokenizer and every weight file it speaks of."""
    tokenizers = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
    if not (folder / "config.json").is_file() or not any(file.is_file() for file in tokenizers):
        return False
    ranks = rank_numbers(folder)
    size = len(ranks) if len(ranks) > 1 else 1
    try:
        for rank in range(size):
            find_weight_files(folder, size, rank)
    except CheckpointError:
        return False
    return True


def _source() -> tuple[str, _Source]:
    name = envs.FD_MODEL_SOURCE
    return name, _SOURCES[name]


def _downloader(source: _Source, advice: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(source.module)
    except ImportError as error:
        raise CheckpointError(
            f"{source.package} is needed for downloading and cannot be imported ({error}): pip"
            f" install 'fastdeploy-lite[{source.extra}]'. {advice}"
        ) from error
    download: Callable[..., Any] = module.snapshot_download
    return download


def _advice(
    name: str, repository: str, target: Path, source: _Source, looked_in: list[Path]
) -> str:
    command = source.command.format(id=repository, dir=target)
    return (
        f"Model {name!r} was not found complete in {' or '.join(map(str, looked_in))}. Without a"
        f" network here, run `{command}` where there is one and copy the folder, or give its path"
        f" as the model; FD_MODEL_SOURCE ({', '.join(_SOURCES)}) chooses another hub"
    )
