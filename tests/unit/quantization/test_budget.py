"""`quantize --bits`: the last int4 layer that a size allows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.quantization.budget import w4_end_layer_for_bits
from fastdeploy_lite.utils.errors import ConfigError


def expert_bits(folder: Path) -> float:
    """Bits a weight of the routed experts, counted in the files."""
    checkpoint = Checkpoint.open(folder)
    stored = sum(checkpoint.get(k).data.nbytes for k in checkpoint if ".experts." in k)
    config = checkpoint.config
    one = 3 * config.hidden_size * config.moe_intermediate_size
    layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    return 8 * stored / (one * config.moe_num_experts * layers)


def test_files_keep_to_the_budget_and_one_layer_more_would_not(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", experts=2, layers=4)
    command = ["quantize", "--quiet", "--model", str(model), "--scheme", "w4w2"]
    for budget in (2.7, 3.2, 3.8, 4.2):
        assert cli.run([*command, "--output", str(tmp_path / "out"), "--force",
                        "--bits", str(budget)]) == 0  # fmt: skip
        assert expert_bits(tmp_path / "out") <= budget
        end = w4_end_layer_for_bits(ModelConfig.from_dir(model), budget)
        if end < 3:
            assert cli.run([*command, "--output", str(tmp_path / "out"), "--force",
                            "--moe-w4-end-layer", str(max(end, 0) + 1)]) == 0  # fmt: skip
            assert expert_bits(tmp_path / "out") > budget


def test_too_small_a_budget_and_two_choices_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", experts=2)
    with pytest.raises(ConfigError, match=r"--bits: found 1.5, expected at least 2\.\d+"):
        w4_end_layer_for_bits(ModelConfig.from_dir(model), 1.5)
    assert cli.run(["quantize", "--model", str(model), "--output", str(tmp_path / "o"),
                    "--bits", "3", "--scheme", "2bits"]) == 1  # fmt: skip
    assert "pass it alone" in capsys.readouterr().err
