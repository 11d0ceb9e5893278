"""Which files of a model folder hold the weights of one rank.

The order of the search is FastDeploy's (docs/checkpoint_format.md): `rank*/` folders, `.pdparams`,
`model.safetensors`, then index files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastdeploy_lite.utils.errors import CheckpointError, ConfigError, quote
from fastdeploy_lite.utils.json_fields import read_json_object

_INDEX_NAMES = (
    "model.safetensors.index.json",
    "master_weights.safetensors.index.json",
    "model_state.pdparams.index.json",
    "peft_model.safetensors.index.json",
)
_RANK_FOLDER = re.compile(r"rank(0|[1-9][0-9]{0,5})")
_RANK_FILE = re.compile(r"model_state\.tp[0-9]+\.pdparams")
_OPTIMIZER_STATE = frozenset({"scheduler.pdparams"})


@dataclass(frozen=True)
class WeightFiles:
    """The files of one rank. `source` is what errors name when a tensor is in none of them.

    `weight_map` (key -> file) is None when there is no index.
    """

    files: tuple[Path, ...]
    source: Path
    weight_map: dict[str, Path] | None = None
    is_presharded: bool = False


def find_weight_files(root: Path, tensor_parallel_size: int = 1, rank: int = 0) -> WeightFiles:
    """Find the weights of `rank` of `tensor_parallel_size` in `root`; CheckpointError if none."""
    if not 0 <= rank < tensor_parallel_size:
        raise ConfigError(f"rank must be in [0, {tensor_parallel_size}), got {rank}")
    ranks = rank_numbers(root)
    if len(ranks) >= 2:
        _check_rank_folders(root, ranks, tensor_parallel_size)
        found = _find_in(root / f"rank{rank}")
        return WeightFiles(found.files, found.source, found.weight_map, is_presharded=True)
    rank_file = root / f"model_state.tp0{rank}.pdparams"
    if tensor_parallel_size > 1 and rank_file.is_file():
        _check_rank_files(root, tensor_parallel_size)
        return WeightFiles((rank_file,), rank_file, is_presharded=True)
    return _find_in(root)


def _find_in(folder: Path) -> WeightFiles:
    pdparams = _pdparams_files(folder)
    if pdparams:
        return WeightFiles(tuple(pdparams), pdparams[0] if len(pdparams) == 1 else folder)
    single = folder / "model.safetensors"
    if single.is_file():
        return WeightFiles((single,), single)
    for name in _INDEX_NAMES:
        if (folder / name).is_file():
            return _from_index(folder / name)
    _explain_missing(folder)
    raise CheckpointError(
        f"{folder}: no weights: expected model.safetensors, {_INDEX_NAMES[0]} or *.pdparams"
    )


def _explain_missing(folder: Path) -> None:
    """Raise CheckpointError for what may stand where weights should be."""
    ranks = rank_numbers(folder)
    if ranks:
        raise CheckpointError(
            f"{folder}: found rank{ranks[0]} alone of a pre-sharded model, expected rank0, rank1"
            " and so on; download the others"
        )
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{folder}: found {len(shards)} files such as {shards[0]}, but no {_INDEX_NAMES[0]},"
            " which says what is in them; download it too"
        )


def _pdparams_files(folder: Path) -> list[Path]:
    # FastDeploy prefers these names to any other; without them every .pdparams file is read.
    for name in ("model_state.pdparams", "lora_model_state.pdparams"):
        if (folder / name).is_file():
            return [folder / name]
    if (folder / "model_state.pdparams.index.json").is_file():
        return []
    found = sorted(p for p in folder.glob("*.pdparams") if p.name not in _OPTIMIZER_STATE)
    sharded = [p for p in found if _RANK_FILE.fullmatch(p.name)]
    if sharded:
        raise CheckpointError(
            f"{folder}: found {len(sharded)} files such as {sharded[0].name}, which are shards"
            f" for tensor-parallel size {len(sharded)}: start with --tensor-parallel-size"
            f" {len(sharded)}"
        )
    return found


def _from_index(index: Path) -> WeightFiles:
    try:
        weight_map = read_json_object(index, refuse_duplicates=True).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(error) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: found {quote(weight_map)}, expected an object of key: file name"
        )
    paths: dict[str, Path] = {}  # one check per shard, not per tensor: there are 30,000 of these
    owners: dict[str, Path] = {}
    for key, name in weight_map.items():
        path = paths.get(name) if isinstance(name, str) else None
        if path is None:
            checked = _checked_shard_name(index, key, name)
            path = paths[checked] = index.parent / checked
        owners[key] = path
    return WeightFiles(tuple(paths.values()), index, owners)


def _checked_shard_name(index: Path, key: str, name: object) -> str:
    if (
        not isinstance(name, str)
        or not name.endswith((".safetensors", ".pdparams"))
        or not name.isprintable()
        or PurePosixPath(name).is_absolute()
        or ".." in PurePosixPath(name).parts
    ):
        raise CheckpointError(
            f"{index}: {key}: found file name {quote(name)},"
            " expected a .safetensors or .pdparams file in this folder"
        )
    try:
        exists = (index.parent / name).is_file()
    except OSError:  # a name beyond the system's limit
        exists = False
    if not exists:
        raise CheckpointError(
            f"{index}: {key}: shard {quote(name)} is not in the folder; download it again"
        )
    return name


def rank_numbers(root: Path) -> list[int]:
    """Return the sorted ranks r for which `root` has a folder `rank{r}`."""
    matches = [_RANK_FOLDER.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def _check_rank_folders(root: Path, ranks: list[int], tensor_parallel_size: int) -> None:
    missing = sorted(set(range(len(ranks))) - set(ranks))
    if missing:
        raise CheckpointError(
            f"{root}: found {len(ranks)} rank folders without rank{missing[0]},"
            f" expected rank0 to rank{len(ranks) - 1}"
        )
    if len(ranks) != tensor_parallel_size:
        raise CheckpointError(
            f"{root}: found {len(ranks)} rank folders, expected {tensor_parallel_size}:"
            f" this checkpoint only supports loading with tp{len(ranks)}; start with"
            f" --tensor-parallel-size {len(ranks)}, or use"
            f" {sibling_repository(root.name, tensor_parallel_size)}"
        )


def _check_rank_files(root: Path, tensor_parallel_size: int) -> None:
    count = sum(1 for p in root.glob("*.pdparams") if _RANK_FILE.fullmatch(p.name))
    if count != tensor_parallel_size:
        raise CheckpointError(
            f"{root}: found {count} model_state.tp*.pdparams files, expected"
            f" {tensor_parallel_size}: start with --tensor-parallel-size {count}"
        )


def sibling_repository(name: str, tensor_parallel_size: int) -> str:
    """Return the released repository for the wanted degree, going by a folder's own name."""
    suffix = f"-TP{tensor_parallel_size}" if tensor_parallel_size > 1 else ""
    if re.search(r"-2Bits(-TP[0-9]+)?-Paddle$", name):
        return re.sub(r"-2Bits(-TP[0-9]+)?-Paddle$", f"-2Bits{suffix}-Paddle", name)
    return f"the model's '...-2Bits{suffix}-Paddle' repository"
