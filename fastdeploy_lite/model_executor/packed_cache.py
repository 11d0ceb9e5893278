"""Parameters as the CPU's kernels read them, kept in a file for the next start.

The first start takes them from the checkpoint and writes them when it has them all; later ones copy
them from the file into memory of the same kind that the first one used, and check every byte. What
is wrong with a file costs one line and the time of a first start, never the start.

Or weights stay where the file is mapped: the start then takes no fresh memory, and processes share
the weights, but they lie in 4 KiB pages on one memory node, which slows every step
(docs/performance.md, "On a CPU: loading").
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from fastdeploy_lite import version
from fastdeploy_lite.checkpoint.fingerprint import folder_state
from fastdeploy_lite.checkpoint.packed_file import (
    ALIGNMENT,
    PackedFile,
    PackedFileError,
    write_packed_file,
)
from fastdeploy_lite.checkpoint.packed_folder import file_name, older_files
from fastdeploy_lite.checkpoint.progress import count_layers, loading_bar
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.parameters import ParameterSource
from fastdeploy_lite.model_executor.ops import (
    ExpertWeight,
    HostLink,
    HostWeight,
    PackedWeight,
    SegmentedWeight,
    Weight,
)
from fastdeploy_lite.utils.arrays import Array

if TYPE_CHECKING:
    from fastdeploy_lite.checkpoint.progress import Bar

log = logging.getLogger(__name__)
CPU = paddle.CPUPlace()


class PackedCache:
    """The file of one rank's parameters, found by what they are made of."""

    def __init__(self, folder: Path, config: RuntimeConfig, offloaded: Iterable[int]) -> None:
        """Args: config: how the model is run; offloaded: layers whose experts leave the card.

        Raises:
            CheckpointError: the model's files cannot be read.
        """
        self._config = config
        self._offloaded = sorted(offloaded)
        self.is_mapped = config.load.packed_cache_access == "map"
        self.fingerprint = self._fingerprint()
        parallel = config.parallel
        self.path = folder / file_name(
            config.model_path.resolve().name,
            self.fingerprint,
            parallel.rank,
            parallel.tensor_parallel_size,
        )

    def open(self) -> PackedFile | None:
        """Return the file, None where there is none that can be used; says why if that is odd."""
        try:
            found = PackedFile(self.path, self.fingerprint)
            found.mark_used()
            return found
        except FileNotFoundError:
            return None
        except PackedFileError as error:
            log.warning("packed weights: %s: loading the checkpoint instead", error)
            return None

    def write(
        self,
        contents: Any,
        arrays: Mapping[str, Array],
        check: Callable[[], None] | None,
        replace: bool,
    ) -> None:
        """Write the file, if not `replace` only where none is by now; says so where that fails."""
        if not replace and self._is_there():
            return
        if self._fingerprint() != self.fingerprint:
            log.warning("packed weights: the checkpoint changed while it was loaded: not written")
            return
        started = time.perf_counter()
        try:
            done = write_packed_file(self.path, self.fingerprint, contents, arrays, check)
        except OSError as error:
            log.warning("packed weights: %s: not written: %s", self.path, error.strerror or error)
            return
        seconds = time.perf_counter() - started
        if done:
            log.info("packed weights: %s written in %.1f s", self.path, seconds)
            self._tell_of_older_files()
        else:
            log.info("packed weights: %s is being written by another process", self.path)

    def _tell_of_older_files(self) -> None:
        """They may still serve a start with other options, or nobody at all."""
        if older := older_files(self.path):
            log.warning(
                "packed weights: %s holds %d other files of this model, %.2f GB: "
                "`fastdeploy-lite packed-cache %s` lists them, and deletes what is not used",
                self.path.parent,
                len(older),
                sum(entry.nbytes for entry in older) / 1e9,
                self.path.parent,
            )

    def _is_there(self) -> bool:
        """Whether another process has written the file meanwhile."""
        try:
            PackedFile(self.path, self.fingerprint).close()
        except (FileNotFoundError, PackedFileError):
            return False
        return True

    def _fingerprint(self) -> str:
        """What decides a bit of the packed weights: files, options, this version, its layout."""
        config, model = self._config, self._config.model
        parallel, load = config.parallel, config.load
        parts = [
            folder_state(config.model_path),
            json.dumps(model.raw, sort_keys=True, default=str),
            repr((model.quantization, load.row_order, load.lm_head_quantization)),
            repr((parallel.tensor_parallel_size, parallel.rank, self._offloaded)),
            version().splitlines()[0],
            ops.layout_probe(),
        ]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


class PackedCacheSource:
    """Parameters from the file of a cache, from the checkpoint where it has none.

    On a card the file holds the routed experts that stay in main memory.
    """

    def __init__(
        self,
        cache: PackedCache,
        open_files: Callable[[bool], ParameterSource],
        place: Any,
        host_links: Mapping[int, HostLink],
        show_progress: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Open what is there.

        Args:
            cache: where the file is.
            open_files: opens the checkpoint; its argument says whether to look for the memory that
                all of it needs.
            place: where weights are kept.
            host_links: layers whose routed experts stay in main memory, and the way there.
            show_progress: draw bars on stderr.
            check: called before each parameter.

        Raises:
            As `open_files`.
        """
        self._cache, self._open_files = cache, open_files
        self._is_all = place.is_cpu_place()
        self._links = host_links
        self._show_progress, self._check = show_progress, check
        self._stored = cache.open()
        self._files: ParameterSource | None = None
        self._is_missing, self._is_damaged = self._stored is None, False
        self._kept: dict[str, Any] = {}
        self._bar: Bar | None = None
        if self._stored is None or not self._is_all:
            self._files = open_files(True)
        if self._stored is not None:
            log.info("packed weights: from %s", cache.path)

    @property
    def nbytes(self) -> int:
        """Bytes that the file will bring, 0 where it brings none."""
        return 0 if self._stored is None else self._stored.total_nbytes

    @property
    def row_order(self) -> str:
        """See ParameterSource."""
        return str(self._said("row_order"))

    @property
    def is_permuted(self) -> bool:
        """See ParameterSource."""
        return bool(self._said("is_permuted"))

    def _said(self, name: str) -> Any:
        if self._files is not None:
            return getattr(self._files, name)
        assert self._stored is not None
        return self._stored.contents[name]

    def __enter__(self) -> PackedCacheSource:
        """Begin loading."""
        if self._files is None:
            self._bar = loading_bar(self.nbytes, self._show_progress)
        else:
            self._files.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Close all files; where every parameter came and the cache lacks some, write it."""
        with contextlib.ExitStack() as stack:
            if self._stored is not None:
                stack.callback(self._stored.close)
            if self._bar is not None:
                stack.callback(self._bar.close)
            if self._files is not None:
                stack.callback(self._files.__exit__, kind, *details)
        if kind is None and (self._is_missing or self._is_damaged):
            self._write()
        self._kept.clear()

    def layers(self, count: int) -> Iterator[int]:
        """See ParameterSource."""
        return count_layers(count, self._show_progress)

    def linear(self, module: str) -> Weight:
        """See ParameterSource."""
        found: Weight = self._get(f"linear {module}", lambda files: files.linear(module))
        return found

    def experts(self, layer: int, name: str) -> ExpertWeight | None:
        """See ParameterSource."""
        link = self._links.get(layer)

        def ask(files: ParameterSource) -> Weight | None:
            found = files.experts(layer, name)
            return found.weight if isinstance(found, HostWeight) else found

        is_kept = self._is_all or link is not None
        found: Weight | None = self._get(f"experts {layer} {name}", ask, is_kept)
        return found if link is None or found is None else HostWeight(found, link)

    def embedding(self) -> PackedWeight:
        """See ParameterSource."""
        found: PackedWeight = self._get("embedding", lambda files: files.embedding())
        return found

    def head(self) -> PackedWeight | None:
        """See ParameterSource."""
        found: PackedWeight | None = self._get("head", lambda files: files.head())
        return found

    def vector(self, key: str) -> Any:
        """See ParameterSource."""
        return self._get(f"vector {key}", lambda files: files.vector(key))

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """See ParameterSource."""
        found: tuple[Any, Any | None] = self._get(
            f"router {layer}", lambda files: files.router(layer)
        )
        return found

    def _get(
        self, name: str, ask: Callable[[ParameterSource], Any], is_kept: bool | None = None
    ) -> Any:
        """A parameter from the file, or from the checkpoint if `is_kept` is false or must be."""
        if not (self._is_all if is_kept is None else is_kept):
            assert self._files is not None
            return ask(self._files)
        if self._stored is not None:
            if self._check is not None:
                self._check()
            try:
                self._kept[name] = found = self._restore(name, self._stored)
                return found
            except PackedFileError as error:
                self._give_up(self._stored, error)
        assert self._files is not None
        self._kept[name] = found = ask(self._files)
        return found

    def _restore(self, name: str, stored: PackedFile) -> Any:
        described = stored.contents["parameters"].get(name, ())
        if described == ():
            raise PackedFileError(f"{stored.path}: {name}: not there")
        if self._cache.is_mapped:
            value = _mapped(described, name, stored)
        else:
            value = _read(described, name, stored)
        if self._bar is not None:
            self._bar.update(sum(array.nbytes for array in _arrays(name, value).values()))
        return value

    def _give_up(self, stored: PackedFile, error: PackedFileError) -> None:
        """Take the rest from the checkpoint; what came so far has been checked."""
        log.warning("packed weights: %s: loading the checkpoint instead", error)
        stored.close()
        self._stored, self._is_damaged = None, True
        if self._files is None:
            self._files = self._open_files(False)
            self._files.__enter__()

    def _write(self) -> None:
        contents = {
            "row_order": self.row_order,
            "is_permuted": self.is_permuted,
            "parameters": {name: _described(value) for name, value in self._kept.items()},
        }
        arrays: dict[str, Array] = {}
        for name, value in self._kept.items():
            arrays |= _arrays(name, value)
        self._cache.write(contents, arrays, self._check, replace=self._is_damaged)


# -- a parameter as plain data and arrays ----------------------------------------------------------


def _described(value: Any) -> Any:
    """What `_allocated` makes the like of a parameter from."""
    if value is None:
        return None
    if isinstance(value, PackedWeight):
        sizes = [value.in_features, value.out_features, value.num_experts]
        return {"weight": [value.kind, *sizes, ops.element_of(value)]}
    if isinstance(value, SegmentedWeight):
        return {"parts": [_described(part) for part in value.parts]}
    if isinstance(value, tuple):
        return {"tuple": [_described(item) for item in value]}
    return {"float32": list(value.shape)}


def _allocated(described: Any) -> Any:
    if described is None:
        return None
    ((form, what),) = described.items()
    if form == "weight":
        kind, rows, columns, experts, element = what
        return ops.allocate_weight(kind, rows, columns, CPU, experts, element)
    if form == "parts":
        return SegmentedWeight(tuple(_allocated(part) for part in what))
    if form == "tuple":
        return tuple(_allocated(item) for item in what)
    return ops.fix(paddle.empty(what, dtype="float32", device=CPU))


def _read(described: Any, name: str, stored: PackedFile) -> Any:
    value = _allocated(described)
    for key, array in _arrays(name, value).items():
        stored.read(key, array)
    return value


def _mapped(described: Any, name: str, stored: PackedFile) -> Any:
    """As `_read`, but weights are where the file is mapped, if that suits the kernels."""
    if described is not None and "parts" in described:
        parts = enumerate(described["parts"])
        return SegmentedWeight(tuple(_mapped(part, f"{name} {i}", stored) for i, part in parts))
    keys = {part: f"{name} {part}" for part in ("data", "scale", "codes")}
    keys = {part: key for part, key in keys.items() if key in stored}
    if described is None or not keys:
        return _read(described, name, stored)
    kind, rows, columns, experts, element = described["weight"]
    arrays = {part: stored.map(key) for part, key in keys.items()}
    if any(array.__array_interface__["data"][0] % ALIGNMENT for array in arrays.values()):
        return _read(described, name, stored)
    try:
        return ops.adopt_weight(kind, rows, columns, experts, element, arrays)
    except ValueError as error:
        raise PackedFileError(f"{stored.path}: {name}: {error}") from None


def _arrays(name: str, value: Any) -> dict[str, Array]:
    """All memory of a parameter, by names in the file."""
    if value is None:
        return {}
    if isinstance(value, PackedWeight):
        return {f"{name} {part}": array for part, array in ops.packed_arrays(value).items()}
    if isinstance(value, SegmentedWeight | tuple):
        items: Sequence[Any] = value if isinstance(value, tuple) else value.parts
        found: dict[str, Array] = {}
        for i, item in enumerate(items):
            found |= _arrays(f"{name} {i}", item)
        return found
    return {name: ops.host_array(value).reshape(-1).view(np.uint8)}
