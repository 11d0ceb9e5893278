"""`.pdparams`: what Paddle writes is read, and nothing in a file is ever executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import tiny_config, tiny_tensors, write_pdparams, write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import verify
from fastdeploy_lite.checkpoint.location import find_weight_files
from fastdeploy_lite.checkpoint.pdparams import PdparamsFile
from fastdeploy_lite.utils.errors import CheckpointError


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_files_of_paddle_save(tmp_path: Path, protocol: int) -> None:
    import paddle

    paddle.seed(0)
    state = {
        "half": paddle.randn([40, 70]).astype("bfloat16"),
        "single": paddle.randn([3, 5, 7]),
        "byte": paddle.arange(9).astype("int8"),
        "unsigned": paddle.arange(9).astype("uint8"),
        "long": paddle.arange(4),
        "scalar": paddle.to_tensor(2.5),
        "empty": paddle.zeros([0, 4]),
    }
    path = tmp_path / "model_state.pdparams"
    paddle.save(state, str(path), protocol=protocol)
    file = PdparamsFile(path)
    dtypes = {key: info.dtype for key, info in file.infos.items()}
    assert dtypes == {
        "half": "BF16",
        "single": "F32",
        "byte": "I8",
        "unsigned": "U8",
        "long": "I64",
        "scalar": "F32",
        "empty": "F32",
    }
    for key, tensor in state.items():
        found = file.get(key)
        values = found.float32() if key == "half" else found.data
        np.testing.assert_array_equal(values, tensor.astype(str(values.dtype)).numpy())
        assert found.data.flags.aligned


def test_files_of_a_layer(tmp_path: Path) -> None:
    import paddle

    layer = paddle.nn.Linear(3, 2)
    path = tmp_path / "layer.pdparams"
    paddle.save(layer.state_dict(), str(path))
    file = PdparamsFile(path)
    np.testing.assert_array_equal(file.get("weight").data, layer.weight.numpy())
    assert set(file.infos) == {"weight", "bias"}


def test_arrays_that_paddle_cut_in_parts(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    state = {
        "w@@.0": whole.reshape(-1)[:10],
        "w@@.1": whole.reshape(-1)[10:],
        "UnpackBigParamInfor@@": {"w": {"OriginShape": (4, 6), "slices": ["w@@.0", "w@@.1"]}},
    }
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps(state, protocol=2))
    file = PdparamsFile(path)
    assert list(file.infos) == ["w"]
    np.testing.assert_array_equal(file.get("w").data, whole)


def test_large_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    array = np.arange(1 << 16, dtype=np.uint8)
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"a": array, "f": np.asfortranarray(array.reshape(256, 256))}))
    file = PdparamsFile(path)
    data = file.get("a").data
    np.testing.assert_array_equal(data, array)
    np.testing.assert_array_equal(file.get("f").data, array.reshape(256, 256))
    assert not data.flags.owndata
    assert not data.flags.writeable
    file.release()
    np.testing.assert_array_equal(data, array)


class Call:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


class Evil:
    """Not a class that anybody admits."""


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Call(open, str(mark), "w"),
        lambda mark: Call(Path.touch, mark),
        lambda mark: Call(getattr, "x", "upper"),
        lambda mark: {"a": Call(os.system, f"touch {mark}")},
        lambda mark: Evil(),
        lambda mark: {"a": np.array([{}], dtype=object)},
        lambda mark: {"a": np.zeros(2, dtype="complex64,int8")},
        lambda mark: {"a": np.zeros(2, dtype=">f4")},
        lambda mark: {"a": np.array(["x"])},
        lambda mark: [np.zeros(2)],
        lambda mark: {(1, 2): np.zeros(2)},
    ],
)
def test_nothing_else_is_admitted(tmp_path: Path, make: Any, protocol: int) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps(make(mark), protocol=protocol))
    with pytest.raises(CheckpointError) as caught:
        PdparamsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_refused_name_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"a": Call(os.system, "true")}, protocol=4))
    with pytest.raises(CheckpointError, match=r"it asks for posix\.system"):
        PdparamsFile(path)


def test_shared_tuples_cannot_stall_the_reader(tmp_path: Path) -> None:
    """A key that is a tuple of 2**60 shared leaves would hash for ever."""
    doubled = b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(60))  # t = (t, t)
    body = b"\x80\x04}" + b"K\x01\x85\x94" + doubled + b"K\x01s."
    pickletools.dis(body, out=io.StringIO())  # it is well formed
    path = tmp_path / "a.pdparams"
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match="keys that are not names"):
        PdparamsFile(path)


def test_truncated_and_empty_files(tmp_path: Path) -> None:
    config = tiny_config("bf16", layers=1, experts=2, vocab_size=64)
    path = tmp_path / "a.pdparams"
    write_pdparams(path, tiny_tensors(config))
    whole = path.read_bytes()
    for size in (0, 1, 2, 10, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a\.pdparams"):
            PdparamsFile(path)


def test_search_order(tmp_path: Path) -> None:
    """rank files, model_state, other .pdparams, model.safetensors, index: as FastDeploy looks."""

    def found(size: int = 1) -> list[str]:
        return [path.name for path in find_weight_files(tmp_path, size, 0).files]

    (tmp_path / "scheduler.pdparams").touch()
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "part.safetensors"}}', encoding="utf-8"
    )
    (tmp_path / "part.safetensors").touch()
    assert found() == ["part.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert found() == ["model.safetensors"]
    (tmp_path / "b.pdparams").touch()
    (tmp_path / "a.pdparams").touch()
    assert found() == ["a.pdparams", "b.pdparams"]
    (tmp_path / "lora_model_state.pdparams").touch()
    assert found() == ["lora_model_state.pdparams"]
    (tmp_path / "model_state.pdparams").touch()
    assert found() == ["model_state.pdparams"]
    for rank in range(2):
        (tmp_path / f"model_state.tp0{rank}.pdparams").touch()
    assert found(2) == ["model_state.tp00.pdparams"]
    assert find_weight_files(tmp_path, 2, 1).is_presharded
    with pytest.raises(CheckpointError, match="found 2 model_state"):
        found(4)


def test_rank_files_alone_say_their_degree(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"model_state.tp0{rank}.pdparams").touch()
    with pytest.raises(CheckpointError, match="--tensor-parallel-size 2"):
        find_weight_files(tmp_path, 1, 0)


def test_rank_files_hold_local_shapes(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, layers=2, vocab_size=64, tensor_parallel_size=2)
    for rank in range(2):
        checkpoint = Checkpoint.open(folder, 2, rank)
        tensors = {
            key: (np.array(checkpoint.get(key).data), checkpoint.info(key).dtype)
            for key in checkpoint.keys()  # noqa: SIM118 - a checkpoint is not a dict
        }
        write_pdparams(folder / f"model_state.tp0{rank}.pdparams", tensors)
    for rank in range(2):
        for path in (folder / f"rank{rank}").iterdir():
            path.unlink()
        (folder / f"rank{rank}").rmdir()
    for rank in range(2):
        checkpoint = Checkpoint.open(folder, 2, rank)
        assert checkpoint.is_presharded
        verify(checkpoint)


def test_a_key_in_two_files_is_refused(tmp_path: Path) -> None:
    config = tiny_config("bf16", layers=1, experts=2, vocab_size=64)
    write_tiny_model(tmp_path, kind="bf16", layers=1, vocab_size=64, file_format="pdparams")
    (tmp_path / "model_state.pdparams").rename(tmp_path / "a.pdparams")
    key = "ernie.norm.weight"
    write_pdparams(tmp_path / "b.pdparams", {key: tiny_tensors(config)[key]})
    with pytest.raises(CheckpointError, match=r"b\.pdparams: ernie\.norm\.weight: found twice"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_index_over_pickles(tmp_path: Path, protocol: int) -> None:
    config = tiny_config("bf16", layers=1, experts=2, vocab_size=64)
    tensors = tiny_tensors(config)
    keys = sorted(tensors)
    names = {key: f"part{i % 2}.pdparams" for i, key in enumerate(keys)}
    for name in set(names.values()):
        part = {key: tensors[key] for key in keys if names[key] == name}
        write_pdparams(tmp_path / name, part, protocol)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model_state.pdparams.index.json").write_text(
        json.dumps({"weight_map": names}), encoding="utf-8"
    )
    checkpoint = Checkpoint.open(tmp_path)
    for key, (array, _) in tensors.items():
        np.testing.assert_array_equal(checkpoint.get(key).data, array)
