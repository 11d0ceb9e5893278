"""`bench_peers.py`: a peer's random model is valid, and a peer that fails is named."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ENTRYPOINTS = Path(__file__).resolve().parents[3] / "entrypoints"
SMALL = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "moe_num_experts": 2,
    "moe_k": 1,
}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ENTRYPOINTS))
    module = importlib.import_module("bench_peers")
    monkeypatch.setattr(module, "SHAPE", {**module.SHAPE, **SMALL})
    monkeypatch.setattr(module, "COMMON", {**module.COMMON, "vocab_size": 64})
    return module


def test_random_blocks_are_small_finite_numbers(peers: ModuleType) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install '.[peers]'")
    for kind in peers.SCALES_AT:
        blocks = peers.random_blocks(kind, (2, 3, 512), np.random.default_rng(0))
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        assert values.shape == (2, 3, 512)
        assert np.isfinite(values).all(), kind
        assert 0.001 < np.abs(values).mean() < 1, kind


def test_the_model_is_what_the_peer_reads(peers: ModuleType, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install '.[peers]'")
    path = tmp_path / "peer.gguf"
    peers.write_gguf(path, 2, "Q2_K")
    assert [p.name for p in tmp_path.iterdir()] == ["peer.gguf"]
    reader = gguf.GGUFReader(path)
    found = {t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type.name) for t in reader.tensors}
    assert found == {name: (shape, kind) for name, shape, kind in peers.peer_tensors(2, "Q2_K")}
    assert found["blk.1.ffn_down_exps.weight"] == ((2, 256, 256), "Q2_K")
    assert "blk.0.ffn_gate_inp.weight" not in found  # the first layer is dense
    architecture = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{architecture}.block_count"].contents() == 2
    (norm,) = (t for t in reader.tensors if t.name == "output_norm.weight")
    np.testing.assert_array_equal(norm.data, np.ones(256, np.float32))


def test_a_peer_that_fails_is_named_with_its_last_words(peers: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho loading >&2\necho 'no such model' >&2\nexit 3\n")
    program.chmod(0o755)
    options = argparse.Namespace(
        llama_bench=program, gguf=tmp_path / "m.gguf", threads=1, prefill=8, decode=8
    )
    with pytest.raises(SystemExit, match="llama-bench failed with status 3: no such model"):
        peers.peer_round(options)
    numbers = '[{"n_prompt": 8, "avg_ts": 30.5}, {"n_prompt": 0, "avg_ts": 4.25}]'
    program.write_text(f"#!/bin/sh\necho '{numbers}'\n")
    assert peers.peer_round(options) == peers.Speed(30.5, 4.25)


def test_ratios_are_those_of_pairs(peers: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine that slows down for a whole round changes no ratio."""
    ours = [peers.Speed(20, 4), peers.Speed(10, 2)]
    peer = [peers.Speed(10, 8), peers.Speed(5, 4)]
    peers.print_table("Q2_K", ours, peer, [9.0, 5.0])
    shown = capsys.readouterr().out
    assert "| ratio of a round's pair | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50) |" in shown
    assert "| llama.cpp Q2_K | 7.50 (5.00 to 10.00) | 6.00 (4.00 to 8.00) |" in shown
