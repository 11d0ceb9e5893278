"""A whole checkpoint in, folders `rank0/` ... out: the same weights, cut for several ranks.

Nothing is quantised anew, so every rank's columns and rows keep the scales of the whole model, and
a folder that is read by one device is that model bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastdeploy_lite.checkpoint import Checkpoint, CheckpointWriter
from fastdeploy_lite.checkpoint.inventory import (
    rank_linears,
    read_embedding,
    read_linear,
    read_lm_head,
    verify,
)
from fastdeploy_lite.checkpoint.linears import check_tensor_parallel
from fastdeploy_lite.checkpoint.tensor import DTYPES
from fastdeploy_lite.checkpoint.writer import write_json
from fastdeploy_lite.quantization.output_folder import copy_companions, prepare_output
from fastdeploy_lite.utils.arrays import Array, float32_to_bfloat16
from fastdeploy_lite.utils.errors import ConfigError


def split_checkpoint(
    model_dir: str | Path,
    output_dir: str | Path,
    tensor_parallel_size: int,
    *,
    shard_bytes: int = 4 << 30,
    force: bool = False,
) -> None:
    """Cut the checkpoint in ``model_dir`` for ``tensor_parallel_size`` ranks into a new folder.

    shard_bytes: size of an output file. force: replace an output folder that is not empty.

    Raises ConfigError (a size that does not divide the model) and CheckpointError (damaged input,
    an input that is cut already, an output folder in use); a failed run leaves no model.
    """
    if tensor_parallel_size < 2:
        raise ConfigError(f"tensor_parallel_size: found {tensor_parallel_size}, expected 2 or more")
    size, output = tensor_parallel_size, Path(output_dir)
    ranks = [Checkpoint.open(model_dir, size, rank) for rank in range(size)]
    if ranks[0].is_presharded:
        raise ConfigError(
            f"{model_dir}: these are folders of ranks already, expected a whole model"
        )
    check_tensor_parallel(ranks[0].config, size, for_files=True)
    verify(ranks[0])
    prepare_output(Path(model_dir), output, force)
    for checkpoint in ranks:
        with CheckpointWriter(output / f"rank{checkpoint.rank}", None, shard_bytes) as writer:
            for key, array, dtype in _tensors(checkpoint):
                writer.add(key, array, dtype)
                checkpoint.release()
    copy_companions(Path(model_dir), output)
    # Last: a folder without it is not taken for a model.
    write_json(output / "config.json", ranks[0].config.family.convert_config(ranks[0].config))


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Array, str]]:
    """Yield key, bits and dtype of everything that one rank holds."""
    family = checkpoint.config.family
    linears = {linear.module: linear for linear in rank_linears(checkpoint)}
    parts = {part for linear in linears.values() for part, _ in linear.parts}
    for key in sorted(checkpoint):
        module = key.rpartition(".")[0]
        if module in linears or module in parts:
            continue
        found = checkpoint.get(key)
        data = found.data
        if key == family.embedding_key:
            data = read_embedding(checkpoint)
        elif key == family.head_key and (head := read_lm_head(checkpoint)) is not None:
            data = head[0]
        yield key, data, found.dtype
    for module, linear in linears.items():
        for name, array in read_linear(checkpoint, linear).arrays.items():
            key = f"{module}.{name}"
            dtype = _stored(checkpoint, key, array)
            yield key, _bits(array, dtype), dtype


def _stored(checkpoint: Checkpoint, key: str, array: Array) -> str:
    """Type that the whole model's file gives a tensor; that of the array for one put together."""
    if key in checkpoint:
        return checkpoint.info(key).dtype
    return "BF16" if array.dtype == np.uint16 else "F32"


def _bits(array: Array, dtype: str) -> Array:
    """Bits of values that were read from that type: scales come as float32, codes as bytes."""
    if dtype == "BF16":
        return array if array.dtype == np.uint16 else float32_to_bfloat16(array)
    wanted = DTYPES[dtype]
    return array.view(wanted) if wanted.itemsize == 1 else array.astype(wanted)
