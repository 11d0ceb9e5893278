"""The writer: what it writes is what is read, by us and by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny_model import tiny_config, tiny_tensors, write_tensors

from fastdeploy_lite.checkpoint import Checkpoint, CheckpointWriter
from fastdeploy_lite.utils.errors import CheckpointError

CONFIG = tiny_config("bf16", layers=1, experts=2, vocab_size=64)


def test_all_types_and_shapes_survive(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        "bytes": (random.integers(0, 256, (3, 5), np.uint8), "U8"),
        "codes": (random.integers(-128, 128, (7,), np.int8), "I8"),
        "half": (random.integers(0, 1 << 16, (2, 3), np.uint16), "BF16"),
        "single": (random.standard_normal((4, 4)).astype(np.float32), "F32"),
        "double": (random.standard_normal(3), "F64"),
        "long": (np.arange(4), "I64"),
        "scalar": (np.array(1.5, np.float32), "F32"),
        "empty": (np.zeros((0, 8), np.float32), "F32"),
        "strided": (np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3], "F32"),
        "fortran": (np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)), "F32"),
    }
    write_tensors(tmp_path, CONFIG, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    for key, (array, dtype) in tensors.items():
        found = checkpoint.get(key)
        assert (found.dtype, found.shape) == (dtype, array.shape)
        np.testing.assert_array_equal(found.data, array)
    with safe_open(str(tmp_path / "model.safetensors"), framework="np") as library:
        for key, (array, dtype) in tensors.items():
            if dtype != "BF16":
                np.testing.assert_array_equal(library.get_tensor(key), array)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == CONFIG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("shard_bytes", [1, 1 << 14, 1 << 17])
def test_shards_and_index(tmp_path: Path, shard_bytes: int) -> None:
    tensors = tiny_tensors(CONFIG)
    write_tensors(tmp_path, CONFIG, tensors, shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    total = sum(array.nbytes for array, _ in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == tensors.keys()
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert set(index["weight_map"].values()) == set(shards)
    for name in shards:
        with safe_open(str(tmp_path / name), framework="np") as library:
            sizes = [tensors[key][0].nbytes for key in library.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= shard_bytes
    checkpoint = Checkpoint.open(tmp_path)
    for key, (array, _) in tensors.items():
        np.testing.assert_array_equal(checkpoint.get(key).data, array)


def test_data_starts_aligned(tmp_path: Path) -> None:
    for length in range(1, 12):
        folder = tmp_path / str(length)
        write_tensors(folder, None, {"k" * length: (np.arange(4, dtype=np.float64), "F64")})
        start = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        assert start % 8 == 0


def test_unaligned_files_of_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    header = b'{"ernie.a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (5 - len(header) % 4)  # a length of 1 modulo 4
    data = np.float32([1.5, -2.0]).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    array = Checkpoint.open(tmp_path).get("ernie.a").data
    assert array.flags.aligned
    np.testing.assert_array_equal(array, [1.5, -2.0])


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    array = np.zeros(100, np.float32)
    with (
        pytest.raises(RuntimeError, match="stop"),
        CheckpointWriter(tmp_path, CONFIG, shard_bytes=512) as writer,
    ):
        for i in range(5):
            writer.add(f"t{i}", array, "F32")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_nothing_looks_complete_before_the_end(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CONFIG, shard_bytes=512)
    for i in range(5):
        writer.add(f"ernie.t{i}", np.zeros(100, np.float32), "F32")
    assert all(path.suffix == ".partial" for path in tmp_path.iterdir())
    # Killed here: the next run starts over.
    with CheckpointWriter(tmp_path, CONFIG) as again:
        again.add("ernie.a", np.zeros(3, np.float32), "F32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert list(Checkpoint.open(tmp_path)) == ["ernie.a"]


def test_misuse_is_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "a", CONFIG)
    with pytest.raises(CheckpointError, match="no tensor"):
        writer.close()
    writer.add("a", np.zeros(2, np.float32), "F32")
    with pytest.raises(CheckpointError, match="written twice"):
        writer.add("a", np.zeros(2, np.float32), "F32")
    with pytest.raises(CheckpointError, match="BF16 cannot be written from float32"):
        writer.add("b", np.zeros(2, np.float32), "BF16")
    with pytest.raises(CheckpointError, match="Q4 cannot be written"):
        writer.add("b", np.zeros(2, np.float32), "Q4")
    writer.close()
    with pytest.raises(CheckpointError, match="already holds weights"):
        CheckpointWriter(tmp_path / "a", CONFIG)
