"""Folders that were made for several ranks run on one device, in packed form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_driver import make_runner
from tiny_model import KINDS, tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint, inventory
from fastdeploy_lite.checkpoint.host_weights import FileWeights, RankFolders
from fastdeploy_lite.checkpoint.reader import open_folders
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.formats import get
from fastdeploy_lite.formats.ccq import to_true_order
from fastdeploy_lite.model_executor.ops import SegmentedWeight
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.utils.errors import CheckpointError, FastDeployError

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 8192, 50)]
# Four ranks need four query heads and experts of 4 x 128 channels; two KV heads are repeated.
WIDE: dict[str, Any] = {"moe_intermediate_size": 512, "intermediate_size": 512}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_cut_from_a_model_is_that_model(
    tmp_path: Path, kind: Any, tied: bool, size: int
) -> None:
    """Rows with equal scales are joined, so every bit is that of the whole model."""
    whole = write_tiny_model(tmp_path / "whole", kind=kind, tied=tied, seed=6, **WIDE)
    cut = write_tiny_model(
        tmp_path / "cut", kind=kind, tied=tied, seed=6, tensor_parallel_size=size, **WIDE
    )
    found, wanted = make_runner(cut), make_runner(whole)
    np.testing.assert_array_equal(found.logits(IDS), wanted.logits(IDS))
    assert found.memory_report().weights == wanted.memory_report().weights


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_for_four_serves_two_ranks_or_one(tmp_path: Path, ranks: int) -> None:
    whole = Checkpoint.open(write_tiny_model(tmp_path / "whole", kind="w4w2", **WIDE), ranks)
    cut = write_tiny_model(tmp_path / "cut", kind="w4w2", tensor_parallel_size=4, **WIDE)
    for rank in range(ranks):
        reference = FileWeights(Checkpoint.open(whole.root, ranks, rank))
        folders = open_folders(cut, ranks, rank)
        assert len(folders) == 4 // ranks
        found = RankFolders(folders, ranks, rank)
        assert found.nbytes <= reference.nbytes * 2
        for module, linear in reference.linears.items():
            (wanted,) = reference.parts(linear)
            (arrays,) = found.parts(found.linears[module])
            for name, array in wanted.items():
                np.testing.assert_array_equal(arrays[name].view(array.dtype), array)
        np.testing.assert_array_equal(found.embedding(), reference.embedding())


def decoded_copy(folder: Path, target: Path) -> Path:
    """What rank folders mean: parts decoded first, then put together, in float32."""
    folders = open_folders(folder)
    config = folders[0].config
    order = (config.quantization and config.quantization.row_order) or "natural"
    tensors: dict[str, Any] = {}
    for key in folders[0]:
        if ".quant_weight" not in key and "_scale" not in key and ".code_zp" not in key:
            tensors[key] = (folders[0].get(key).data, folders[0].get(key).dtype)
    weights = RankFolders(folders)
    tensors[config.family.embedding_key] = (weights.embedding(), "BF16")
    for module, linear in weights.linears.items():
        parts = []
        for one in folders:
            local = next(x for x in inventory.rank_linears(one) if x.module == module)
            read = inventory.read_linear(one, local)
            matrix = get(read.kind).decode(read.arrays)
            parts.append((local, to_true_order(matrix, order) if read.kind == "ccq" else matrix))
        if linear.is_row_split:
            weight = np.concatenate([matrix for _, matrix in parts])
        else:
            columns = {}
            for local, matrix in parts:
                at = 0
                for start, stop in local.column_ranges:
                    columns[start] = matrix[:, at : at + stop - start]
                    at += stop - start
            weight = np.concatenate([columns[start] for start in sorted(columns)], axis=1)
        tensors[f"{module}.weight"] = (np.ascontiguousarray(weight), "F32")
    dense = {k: v for k, v in config.raw.items() if "quant" not in k}
    write_tensors(target, dense, tensors)
    return target


@pytest.mark.parametrize("order", ["natural", "permuted"])
@pytest.mark.parametrize("scheme", ["2bits", "w4w2", "wint8"])
def test_parts_with_scales_of_their_own_stay_apart(tmp_path: Path, scheme: Any, order: Any) -> None:
    """As the published folders: every rank quantised by itself, rows with other scales."""
    source = write_tiny_model(tmp_path / "bf16", kind="bf16", layers=3, experts=2)
    folder = tmp_path / "tp2"
    quantize_checkpoint(
        source, folder, scheme=scheme, row_order=order, tensor_parallel_size=2, progress=False
    )
    folders = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert folders == ["rank0", "rank1", "report"]
    runner = make_runner(folder)
    moe = runner.model.layers[2].mlp
    assert isinstance(moe.down, SegmentedWeight)
    assert isinstance(moe.up_gate, SegmentedWeight)
    assert isinstance(moe.shared.down.weight, SegmentedWeight)
    assert isinstance(runner.model.layers[0].attention.output.weight, SegmentedWeight)
    assert not isinstance(runner.model.layers[0].attention.qkv.weight, SegmentedWeight)
    wanted = make_runner(decoded_copy(folder, tmp_path / "dense")).logits(IDS)
    np.testing.assert_allclose(runner.logits(IDS), wanted, atol=1e-3)
    np.testing.assert_array_equal(  # prefilled in one piece or in chunks
        runner.logits(IDS), make_runner(folder, tokens=64).logits(IDS)
    )


def test_tables_that_every_rank_has_whole(tmp_path: Path) -> None:
    cut = write_tiny_model(tmp_path / "cut", tied=False, tensor_parallel_size=2, seed=8)
    whole = write_tiny_model(tmp_path / "whole", tied=False, seed=8)
    tables = Checkpoint.open(whole)
    for rank in (0, 1):
        checkpoint = Checkpoint.open(cut, 2, rank)
        tensors = {k: (checkpoint.get(k).data, checkpoint.get(k).dtype) for k in checkpoint}
        for key in ("ernie.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = (tables.get(key).data, "BF16")
        (cut / f"rank{rank}/model.safetensors").unlink()
        write_tensors(cut / f"rank{rank}", None, tensors)
    np.testing.assert_array_equal(make_runner(cut).logits(IDS), make_runner(whole).logits(IDS))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(FastDeployError) as caught:
        make_runner(folder)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a", tensor_parallel_size=4, layers=2, **WIDE)
    shutil.rmtree(folder / "rank1")
    refused(folder, "without rank1", "rank0 to rank2")
    (folder / "rank3").rename(folder / "rank1")
    refused(folder, "found 3 rank folders of a model for 4 ranks", "rank0 to rank3")
    shutil.rmtree(folder / "rank2")
    refused(folder, "found 2 rank folders of a model for 4 ranks")
    shutil.rmtree(folder / "rank1")
    refused(folder, "found rank0 alone of a pre-sharded model")


def test_a_number_of_ranks_that_no_model_has(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, tensor_parallel_size=2, layers=2, vocab_size=24 * 64)
    shutil.copytree(folder / "rank1", folder / "rank2")
    refused(folder, "found 3 rank folders of a model for 2 ranks")


def test_ranks_of_other_layers_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a", tensor_parallel_size=2, layers=3)
    short = write_tiny_model(tmp_path / "b", tensor_parallel_size=2, layers=2)
    shutil.rmtree(folder / "rank1")
    shutil.copytree(short / "rank1", folder / "rank1")
    refused(folder, "rank1", "found 2 decoder layers, expected 3", "layer 2 is in")


def test_ranks_of_other_formats_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "a", kind="w4w2", tensor_parallel_size=2)
    other = write_tiny_model(tmp_path / "b", kind="2bits", tensor_parallel_size=2)
    shutil.rmtree(folder / "rank1")
    shutil.copytree(other / "rank1", folder / "rank1")
    refused(folder, "rank1", "found ccq weights, expected int4", "not of one model")


def test_a_config_with_fewer_layers_than_the_files_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "num_hidden_layers: found 2", "holds layer 2: expected 3")
    config |= {"num_hidden_layers": 3, "remove_tail_layer": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert make_runner(folder).logits(IDS).shape == (50, 8192)


def test_the_writer_needs_sizes_that_divide(tmp_path: Path) -> None:
    config = tiny_config("bf16")
    write_tensors(tmp_path / "bf16", config, tiny_tensors(config))
    with pytest.raises(FastDeployError, match=r"tensor_parallel_size 4: .*this model allows 1, 2"):
        quantize_checkpoint(
            tmp_path / "bf16", tmp_path / "out", scheme="2bits", tensor_parallel_size=4
        )
    assert not (tmp_path / "out").exists()
    assert issubclass(CheckpointError, FastDeployError)
    assert ModelConfig.from_dir(tmp_path / "bf16").quantization is None
