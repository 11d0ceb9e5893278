"""A checkpoint folder as a mapping from tensor names to host arrays, lazily.

Opening reads headers only. Data come as views of mapped files, so a loader that copies or repacks
tensor by tensor and calls `release` now and then never holds more than its own weights and the
pages of what it is reading.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.checkpoint.location import WeightFiles, find_weight_files, rank_numbers
from fastdeploy_lite.checkpoint.pdparams import PdparamsFile
from fastdeploy_lite.checkpoint.safetensors_file import SafetensorsFile
from fastdeploy_lite.checkpoint.tensor import Array, HostTensor, TensorInfo
from fastdeploy_lite.models.family import Location, ModelConfig
from fastdeploy_lite.models.sharding import obstacle
from fastdeploy_lite.utils.errors import CheckpointError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
_PIECE = 1 << 18  # elements looked at in one go: they stay in the cache


class _WeightFile(Protocol):
    infos: dict[str, TensorInfo]

    def get(self, key: str) -> HostTensor: ...

    def release(self) -> None: ...


class Checkpoint:
    """Tensors of one rank of one model folder; build it with `Checkpoint.open`."""

    def __init__(
        self,
        root: Path,
        config: ModelConfig,
        location: WeightFiles,
        tensor_parallel_size: int,
        rank: int,
    ) -> None:
        self.root = root
        self.config = config
        self.tensor_parallel_size = tensor_parallel_size
        self.rank = rank
        self.is_presharded = location.is_presharded
        self.source = location.source
        self._files = {path: _open_file(path) for path in location.files}
        self._owner = _merge(self._files, location)
        self._touched: set[Path] = set()
        shapes = {key: self._files[path].infos[key].shape for key, path in self._owner.items()}
        self.spelling = config.family.spelling(shapes)
        self._locations = config.family.locate(shapes) or {key: Location(key) for key in shapes}

    @classmethod
    def open(
        cls,
        path: str | Path,
        tensor_parallel_size: int = 1,
        rank: int = 0,
        config_name: str = "config.json",
    ) -> Checkpoint:
        """Open model folder `path` for `rank` of `tensor_parallel_size`.

        With `rank*/` folders (pre-sharded models) their number must be the degree and the tensors
        are this rank's; otherwise the tensors are whole and the caller slices them
        (`is_presharded` tells). Raises ConfigError or CheckpointError, naming file and key.
        """
        root = Path(path)
        if not root.is_dir():
            raise CheckpointError(f"{root}: no such folder")
        config = ModelConfig.from_dir(root, config_name)
        location = find_weight_files(root, tensor_parallel_size, rank)
        return cls(root, config, location, tensor_parallel_size, rank)

    def keys(self) -> Iterable[str]:
        """Return all tensor names, in the spelling of the model's family."""
        return self._locations.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._locations

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def info(self, key: str) -> TensorInfo:
        """Return dtype, shape, size and file of `key`; CheckpointError if there is none.

        The shape is that of `get`; the key of the result is the file's own name for the tensor.
        """
        location = self._location(key)
        found = self._file(location).infos[location.key]
        shape, nbytes = found.shape, found.nbytes
        if location.index is not None:
            nbytes //= max(shape[0], 1)
            shape = shape[1:]
        if location.transposed:
            shape = shape[::-1]
        return replace(found, shape=shape, nbytes=nbytes)

    def get(self, key: str) -> HostTensor:
        """Return tensor `key` as a read-only view; CheckpointError if there is none."""
        location = self._location(key)
        self._touched.add(self._owner[location.key])
        found = self._file(location).get(location.key)
        data = found.data if location.index is None else found.data[location.index]
        return replace(found, data=data.T) if location.transposed else replace(found, data=data)

    def expect(
        self,
        key: str,
        dtypes: str | Iterable[str],
        shape: Shape | Iterable[Shape],
        finite: bool = False,
    ) -> HostTensor:
        """Return `key` after checking dtype (any of), shape (any of) and, if asked, finiteness.

        Raises CheckpointError `FILE: KEY: found .., expected ..`.
        """
        info = self.info(key)
        allowed_dtypes = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
        allowed_shapes = _as_shapes(shape)
        if info.dtype not in allowed_dtypes or info.shape not in allowed_shapes:
            wanted = describe_expected(allowed_dtypes, allowed_shapes)
            raise CheckpointError(
                f"{info.file}: {info.key}: found {info.describe()}, expected {wanted}"
            )
        tensor = self.get(key)
        if finite:
            check_finite(tensor)
        return tensor

    def release(self) -> None:
        """Give back the memory of file pages read so far; arrays from `get` stay valid."""
        for path in self._touched:
            self._files[path].release()
        self._touched.clear()

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(self._files[path].infos[key].nbytes for key, path in self._owner.items())

    def _location(self, key: str) -> Location:
        location = self._locations.get(key)
        if location is None:
            raise CheckpointError(f"{self.source}: {key}: found nothing, expected this tensor")
        return location

    def _file(self, location: Location) -> _WeightFile:
        return self._files[self._owner[location.key]]


def open_folders(
    path: str | Path,
    tensor_parallel_size: int = 1,
    rank: int = 0,
    config_name: str = "config.json",
) -> list[Checkpoint]:
    """Open model folder `path` for `rank` of `tensor_parallel_size`, also if it has more ranks.

    Returns one checkpoint, or those of the rank folders that together hold what this rank needs: a
    folder for four ranks serves one, two or four. For eight, each of its folders serves two ranks:
    the checkpoint then says the size that it was cut for. Raises as `Checkpoint.open`.
    """
    root = Path(path)
    count = len(rank_numbers(root)) if root.is_dir() else 0
    if count > 1 and tensor_parallel_size > count and tensor_parallel_size % count == 0:
        share = tensor_parallel_size // count
        folders = [Checkpoint.open(root, count, rank // share, config_name)]
        _check_number(root, folders[0], count)
        return folders
    if count < 2 or count == tensor_parallel_size or count % tensor_parallel_size:
        return [Checkpoint.open(root, tensor_parallel_size, rank, config_name)]
    share = count // tensor_parallel_size
    ranks = range(rank * share, (rank + 1) * share)
    folders = [Checkpoint.open(root, count, one, config_name) for one in ranks]
    _check_number(root, folders[0], count)
    _check_layers(folders)
    return folders


def _check_number(root: Path, folder: Checkpoint, count: int) -> None:
    """Refuse some of a model's rank folders: the vocabulary's share tells how many there are."""
    config = folder.config
    key = config.family.embedding_key
    rows = folder.info(key).shape[0] if key in folder and folder.info(key).shape else 0
    made_for = config.vocab_size // rows if rows and config.vocab_size % rows == 0 else count
    if made_for not in (1, count):  # 1: a table that every rank has whole
        raise CheckpointError(
            f"{root}: found {count} rank folders of a model for {made_for} ranks (rank0 has {rows}"
            f" of {config.vocab_size} embeddings), expected rank0 to rank{made_for - 1}; download"
            " the others"
        )
    reason = obstacle(config, count, for_files=True)
    if reason is not None:
        raise CheckpointError(
            f"{root}: found {count} rank folders, which a model of these sizes cannot have:"
            f" {reason}"
        )


def _check_layers(folders: list[Checkpoint]) -> None:
    """Refuse folders that hold different decoder layers."""
    held = [
        {layer for key in folder if (layer := folder.config.family.layer_of(key)) is not None}
        for folder in folders
    ]
    for folder, layers in zip(folders, held, strict=True):
        other = sorted(layers ^ held[0])
        if other:
            has, lacks = (folder, folders[0]) if other[0] in layers else (folders[0], folder)
            raise CheckpointError(
                f"{folder.source}: found {len(layers)} decoder layers, expected {len(held[0])} as"
                f" in {folders[0].source}: layer {other[0]} is in {has.source} but not in"
                f" {lacks.source}"
            )


def describe_expected(dtypes: tuple[str, ...], shapes: Iterable[Shape]) -> str:
    """Return what error messages say of an expected tensor, such as `BF16 [8, 4] or [4, 8]`."""
    return f"{'/'.join(dtypes)} {' or '.join(str(list(s)) for s in shapes)}"


def _as_shapes(shape: Shape | Iterable[Shape]) -> list[Shape]:
    """Return one shape or several as a list of shapes."""
    items: list[int | Shape] = list(shape)
    sizes = [item for item in items if isinstance(item, int)]
    if len(sizes) == len(items):
        return [tuple(sizes)]
    return [tuple(item) for item in items if not isinstance(item, int)]


def check_finite(tensor: HostTensor) -> None:
    """Raise CheckpointError if a floating-point tensor holds NaN or infinity, with its index."""
    data = tensor.data
    # Elements are counted as the file has them, and a transposed view would be copied.
    flat = (data if data.flags.c_contiguous else data.T).reshape(-1)
    count, first = 0, 0
    # Piece by piece, because the masks of a whole embedding table would be gigabytes.
    for start in range(0, flat.size, _PIECE):
        bad = _not_finite(flat[start : start + _PIECE], tensor.dtype)
        if bad.any():
            first = first if count else start + int(bad.argmax())
            count += int(bad.sum())
    if count:
        found = HostTensor(flat[first : first + 1], tensor.dtype, tensor.key, tensor.file)
        raise CheckpointError(
            f"{tensor.file}: {tensor.key}: found {found.float32()[0]} at element {first}"
            f" ({count} such), expected finite values"
        )


def _not_finite(values: Array, dtype: str) -> npt.NDArray[np.bool_]:
    if dtype != "BF16":
        return ~np.isfinite(values)
    exponent = np.uint16(0x7F80)  # all its bits are set in infinities and NaN only
    found: npt.NDArray[np.bool_] = (values & exponent) == exponent
    return found


def _open_file(path: Path) -> _WeightFile:
    return PdparamsFile(path) if path.suffix == ".pdparams" else SafetensorsFile(path)


def _merge(files: dict[Path, _WeightFile], location: WeightFiles) -> dict[str, Path]:
    """Return key -> file by the index, or by the files themselves where there is no index."""
    if location.weight_map is not None:
        for key, path in location.weight_map.items():
            if key not in files[path].infos:
                raise CheckpointError(
                    f"{path}: {key}: found nothing, expected this tensor"
                    f" ({location.source.name} says that it is here)"
                )
        return location.weight_map
    owner: dict[str, Path] = {}
    for path, file in files.items():
        for key in file.infos:
            if key in owner:
                raise CheckpointError(f"{path}: {key}: found twice, also in {owner[key].name}")
            owner[key] = path
    return owner
