"""`--packed-cache`: the same bits as from the checkpoint, and never anything but those."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_links import MemoryLink
from model_driver import make_runner
from tiny_model import KINDS, Kind, write_tiny_model

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.checkpoint import packed_file
from fastdeploy_lite.config import ExpertOffloadConfig, LoadConfig, ModelConfig
from fastdeploy_lite.engine import args_utils
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.model_executor import expert_placement, ops, packed_cache, weights
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError
from fastdeploy_lite.worker.model_runner import ModelRunner

IDS = [5, 900, 17, 17, 4000, 8191]


ACCESS: dict[str, Any] = {}


@pytest.fixture(params=["copy", "map"], autouse=True)
def access(request: pytest.FixtureRequest) -> Iterator[str]:
    """How `load` takes weights from the file."""
    ACCESS["packed_cache_access"] = request.param
    yield request.param
    ACCESS.clear()


def load(folder: Path, cache: Path | None, **more: Any) -> ModelRunner:
    options = {**ACCESS, **more.pop("load", {})}
    return make_runner(folder, load=LoadConfig(packed_cache=cache, **options), **more)


def logits(folder: Path, cache: Path | None, **more: Any) -> np.ndarray[Any, Any]:
    return load(folder, cache, **more).logits(IDS)


def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no checkpoint may be opened."""
    monkeypatch.setattr(weights, "open_weights", lambda config: pytest.fail("opened"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", kind="w4w2", seed=3)


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_same_bits_without_the_checkpoint(
    tmp_path: Path, kind: Kind, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = write_tiny_model(tmp_path / "m", kind=kind, tied=tied), tmp_path / "cache"
    plain, first = load(folder, None), load(folder, cache)
    no_files(monkeypatch)
    second = load(folder, cache)
    for runner in (first, second):
        np.testing.assert_array_equal(runner.logits(IDS), plain.logits(IDS))
        assert runner.memory_report() == plain.memory_report()
    for mine, others in zip(all_weights(second), all_weights(plain), strict=True):
        assert (mine.kind, mine.num_experts) == (others.kind, others.num_experts)
        for name, array in ops.packed_arrays(others).items():
            np.testing.assert_array_equal(ops.packed_arrays(mine)[name], array)


def all_weights(runner: ModelRunner) -> list[Any]:
    return [weight for found in runner.model.weights().values() for weight in found]


@pytest.mark.parametrize(
    "options",
    [{"row_order": "permuted"}, {"row_order": "natural"}, {"lm_head_quantization": "wint8"}],
)
def test_options_have_files_of_their_own(
    model: Path, tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    load(model, cache)
    expected = logits(model, None, load=options)
    np.testing.assert_array_equal(logits(model, cache, load=options), expected)
    assert len(list(cache.iterdir())) == 2
    no_files(monkeypatch)
    np.testing.assert_array_equal(logits(model, cache, load=options), expected)


def test_quantised_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = write_tiny_model(tmp_path / "m", kind="bf16"), tmp_path / "cache"
    models = [ModelConfig.from_dir(folder).with_quantization(w) for w in (None, "wint4", "wint8")]
    expected = [logits(folder, None, model=model) for model in models]
    for _ in range(2):
        found = [logits(folder, cache, model=model) for model in models]
        np.testing.assert_array_equal(found, expected)
        no_files(monkeypatch)
    assert len(list(cache.iterdir())) == 3


def test_experts_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that ranks have quantised apart have weights of several segments."""
    from fastdeploy_lite.quantization.convert import quantize_checkpoint

    wide: Any = {"moe_intermediate_size": 512, "intermediate_size": 512}
    whole, parts = write_tiny_model(tmp_path / "bf16", kind="bf16", **wide), tmp_path / "parts"
    quantize_checkpoint(whole, parts, scheme="2bits", tensor_parallel_size=2, progress=False)
    expected = logits(parts, None)
    np.testing.assert_array_equal(logits(parts, tmp_path / "cache"), expected)
    no_files(monkeypatch)
    np.testing.assert_array_equal(logits(parts, tmp_path / "cache"), expected)


def test_experts_beside_a_card(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on the card comes from the checkpoint, the experts from the file."""
    monkeypatch.setattr(expert_placement, "open_link", lambda place: MemoryLink())
    cache, offload = tmp_path / "cache", ExpertOffloadConfig(cpu_layers=1)
    expected = logits(model, None, expert_offload=offload)
    for _ in range(2):
        found = logits(model, cache, expert_offload=offload)
        np.testing.assert_array_equal(found, expected)


def test_a_draft_layer_follows_the_row_order(tmp_path: Path) -> None:
    folder, cache = write_tiny_model(tmp_path / "m", kind="2bits"), tmp_path / "cache"
    for order in ("natural", "permuted"):
        config = LoadConfig(row_order=order, packed_cache=cache, **ACCESS)  # type: ignore[arg-type]
        found = []
        for _ in range(2):
            runner = ModelRunner(make_runner(folder, load=config).config)
            with weights.open_source(runner.config, runner.place, False) as source:
                found.append((source.is_permuted, source.row_order))
                source.embedding()
        assert found[0] == found[1]
        assert found[0][0] == (order == "permuted")


def test_mapped_weights_take_no_memory_and_copied_ones_do(
    model: Path, tmp_path: Path, access: str
) -> None:
    cache = tmp_path / "cache"
    load(model, cache)
    runner = load(model, cache)
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        maps.append((first, last, line))
    for weight in all_weights(runner):
        for tensor in weight.tensors.values():
            address = tensor.data_ptr()
            (line,) = [line for first, last, line in maps if first <= address < last]
            assert (str(cache) in line and " r--s " in line) == (access == "map")


def test_arrays_at_odd_places_are_copied(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, expected = tmp_path / "cache", logits(model, None)
    load(model, cache)
    monkeypatch.setattr(packed_cache, "ALIGNMENT", 1 << 40)
    np.testing.assert_array_equal(logits(model, cache), expected)
    monkeypatch.setattr(ops, "adopt_weight", lambda *_: pytest.fail("adopted"))
    load(model, cache)


@pytest.mark.parametrize("wrong", [{}, {"data": np.zeros(3, np.uint8)}])
def test_memory_of_another_size_is_not_adopted(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"adopt_weight: arrays have .*, expected \{'data': 8192\}"
    ):
        ops.adopt_weight("dense", 64, 64, 0, "bf16", wrong)


# -- what has changed ------------------------------------------------------------------------------


def test_a_changed_checkpoint_is_noticed(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load(model, cache)
    weights_file = next(model.glob("*.safetensors"))
    before = weights_file.stat()
    other = write_tiny_model(tmp_path / "other", kind="w4w2", seed=4)
    shutil.copy(next(other.glob("*.safetensors")), weights_file)
    assert weights_file.stat().st_size == before.st_size
    np.testing.assert_array_equal(logits(model, cache), logits(other, None))
    assert len(list(cache.iterdir())) == 2


def test_what_a_change_leaves_behind_is_told(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With how to be rid of it: the files are as large as the weights."""
    cache = tmp_path / "cache"
    load(model, cache)
    assert said(caplog) == []
    old = only_file(cache)
    os.utime(old, (0, 0))
    load(model, cache)
    assert said(caplog) == []
    assert time.time() - old.stat().st_mtime < 600, "its last use"
    os.utime(next(model.glob("*.safetensors")), (0, 0))
    load(model, cache)
    [line] = said(caplog)
    assert f"{cache} holds 1 other files of this model" in line
    assert f"fastdeploy-lite packed-cache {cache}" in line


@pytest.mark.parametrize("change", ["touch", "name", "config"])
def test_signs_of_change(model: Path, tmp_path: Path, change: str) -> None:
    cache, weights_file = tmp_path / "cache", next(model.glob("*.safetensors"))
    load(model, cache)
    if change == "touch":
        os.utime(weights_file, ns=(0, weights_file.stat().st_mtime_ns + 1))
    elif change == "name":
        shutil.copy2(weights_file, model / "more.safetensors")
    else:
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace('"rms_norm_eps": 1e-05', '"a": 1'))
        assert (model / "config.json").read_text() != config
    load(model, cache)
    assert len(list(cache.iterdir())) == 2


def test_another_layout_of_the_kernels_has_another_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    load(model, cache)
    monkeypatch.setattr(ops, "layout_probe", lambda: "other")
    load(model, cache)
    assert len(list(cache.iterdir())) == 2


def test_the_probe_sees_packed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_lite.model_executor.ops import weights as op_weights

    probe = ops.layout_probe()
    assert probe == ops.layout_probe()
    fill = op_weights.fill_weight

    def swapped(weight: Any, expert: int | None, /, **arrays: Any) -> None:
        fill(weight, expert, **arrays)
        if expert == 0:
            data = ops.host_array(weight.tensors["data"])
            data[:2] = data[1::-1]

    monkeypatch.setattr(op_weights, "fill_weight", swapped)
    assert ops.layout_probe() != probe


def test_a_checkpoint_that_changes_while_it_is_loaded(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ops.finish_weight

    def touching(weight: Any) -> None:
        os.utime(next(model.glob("*.safetensors")))
        finish(weight)

    monkeypatch.setattr(ops, "finish_weight", touching)
    load(model, tmp_path / "cache")
    assert said(caplog) == [
        "packed weights: the checkpoint changed while it was loaded: not written"
    ]
    assert not (tmp_path / "cache").exists()


# -- what is wrong with the file -------------------------------------------------------------------


def test_damage_costs_a_line_and_the_file_is_written_again(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, expected = tmp_path / "cache", logits(model, None)
    load(model, cache)
    path = only_file(cache)
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    places = np.linspace(start, len(good) - 1, 12).astype(int)
    for at in [3, 200, *places]:
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        assert said(caplog) == []
        np.testing.assert_array_equal(logits(model, cache), expected)
        (line,) = said(caplog)
        assert line.startswith(f"packed weights: {path}: ")
        assert line.endswith(": loading the checkpoint instead")
        assert path.read_bytes() == good
        assert only_file(cache) == path


@pytest.mark.parametrize("damage", ["empty", "short", "foreign", "old", "link", "unreadable"])
def test_files_that_cannot_be_used(
    model: Path,
    tmp_path: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, expected = tmp_path / "cache", logits(model, None)
    with monkeypatch.context() as patch:
        if damage == "old":
            patch.setattr(packed_file, "VERSION", 0)
        load(model, cache)
    path = only_file(cache)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        os.truncate(path, path.stat().st_size - 100_000)
    elif damage == "foreign":
        shutil.copy(next(model.glob("*.safetensors")), path)
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "unreadable":
        refuse_to_open(path, monkeypatch)
    np.testing.assert_array_equal(logits(model, cache), expected)
    (line,) = said(caplog)
    assert line.startswith(f"packed weights: {path}: ")
    monkeypatch.undo()
    no_files(monkeypatch)
    np.testing.assert_array_equal(logits(model, cache), expected)
    assert said(caplog) == []


def refuse_to_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for another user; tests may run as root, who may read anything."""
    real = os.open

    def refusing(name: Any, *arguments: Any, **more: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *arguments, **more)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("obstacle", ["file", "full", "read-only"])
def test_a_folder_that_cannot_be_written_costs_a_line(
    model: Path,
    tmp_path: Path,
    obstacle: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, expected = tmp_path / "cache", logits(model, None)
    if obstacle == "file":
        cache.write_text("no folder")
    else:
        cache.mkdir()

        def refuse(*_: Any, **__: Any) -> None:
            number = 28 if obstacle == "full" else 30
            raise OSError(number, os.strerror(number))

        name = "_check_room" if obstacle == "full" else "_own"
        monkeypatch.setattr(packed_file, name, refuse)
    np.testing.assert_array_equal(logits(model, cache), expected)
    (line,) = said(caplog)
    reason = {"file": "File exists", "full": "No space left", "read-only": "Read-only file system"}
    assert "packed weights: " in line
    assert f"not written: {reason[obstacle]}" in line
    if obstacle != "file":
        assert list(cache.iterdir()) == []


def test_too_little_memory_is_said_before_loading(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, tmp_path / "cache")
    monkeypatch.setattr(weights, "available_bytes", lambda: 1 << 20)
    with pytest.raises(FastDeployError, match="the weights need"):
        load(model, tmp_path / "cache")


def test_a_failed_load_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(ops, "finish_weight", refuse)
    with pytest.raises(ValueError, match="no"):
        load(model, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


STARTS = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[4])
from model_driver import make_runner
from fastdeploy_lite.config import LoadConfig

expected = np.load(sys.argv[3])
for _ in range(4):
    load = LoadConfig(packed_cache=Path(sys.argv[2]), packed_cache_access=sys.argv[5])
    found = make_runner(Path(sys.argv[1]), load=load).logits([5, 900, 17, 17, 4000, 8191])
    assert np.array_equal(found, expected)
"""


def test_three_processes_start_at_once(model: Path, tmp_path: Path, access: str) -> None:
    cache, expected = tmp_path / "cache", tmp_path / "expected.npy"
    np.save(expected, logits(model, None))
    tests = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", STARTS, *map(str, (model, cache, expected)), tests, access]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr.decode()
    assert only_file(cache).suffix == ".safetensors"


# -- the option ------------------------------------------------------------------------------------


def test_flag_and_variable(
    model: Path, tmp_path: Path, access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(**arguments: Any) -> Path | None:
        return EngineArgs(model=str(model), **arguments).create_runtime_config().load.packed_cache

    assert wanted() is None
    assert wanted(packed_cache="here") == Path.cwd() / "here"
    monkeypatch.setenv("FD_LITE_PACKED_CACHE", str(tmp_path))
    assert wanted() == tmp_path
    assert wanted(packed_cache="~/there") == Path.home() / "there"
    config = EngineArgs(model=str(model), packed_cache_access=access).create_runtime_config()
    assert config.load.packed_cache_access == access
    with pytest.raises(ConfigError, match="packed_cache_access must be one of copy, map, got 'x'"):
        EngineArgs(model=str(model), packed_cache_access="x")
    with pytest.raises(ConfigError, match="packed_cache_access must be copy or map"):
        LoadConfig(packed_cache_access="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{}, {"load_choices": "dummy"}])
def test_where_it_has_no_effect_that_is_said(
    model: Path, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(args_utils, "_warn_once", lines.append)
    monkeypatch.setattr(args_utils, "_on_cpu", lambda: bool(more))
    args = EngineArgs(model=str(model), packed_cache="x", **more)
    args.create_runtime_config()
    assert lines == ["packed_cache has no effect here: it is for weights of files in main memory"]
    if not more:
        lines.clear()
        args = EngineArgs(model=str(model), packed_cache="x", moe_device="cpu")
        args.create_runtime_config()
        assert lines == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_llm(model: Path, tmp_path: Path, ranks: int, access: str) -> None:
    """Ranks are processes; each has a file of its own."""
    cache = tmp_path / "cache"

    def tokens(**more: Any) -> list[int]:
        parallel = {"tensor_parallel_size": ranks, "packed_cache_access": access}
        llm = LLM(str(model), max_model_len=128, **parallel, **more)
        try:
            params = SamplingParams(temperature=0, max_tokens=8)
            (answer,) = llm.generate([{"prompt_token_ids": IDS}], params, use_tqdm=False)
            return list(answer.outputs.token_ids)
        finally:
            del llm

    expected = tokens()
    assert tokens(packed_cache=str(cache)) == expected
    names = sorted(path.name.split(".")[-2] for path in cache.iterdir())
    assert names == [f"rank{rank}of{ranks}" for rank in range(ranks)]
    before = [path.stat().st_ino for path in sorted(cache.iterdir())]
    assert tokens(packed_cache=str(cache)) == expected
    assert [path.stat().st_ino for path in sorted(cache.iterdir())] == before
