"""`quantize --bits` and `--int4-layers`: the int4 layers that a size allows, and any others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.quantization.budget import w4_end_layer_for_bits, w4_layers_for_bits
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
    for bits in (1.5, float("nan")):
        with pytest.raises(ConfigError, match=rf"--bits: found {bits}, expected at least 2\.\d+"):
            w4_end_layer_for_bits(ModelConfig.from_dir(model), bits)
    assert cli.run(["quantize", "--model", str(model), "--output", str(tmp_path / "o"),
                    "--bits", "3", "--scheme", "2bits"]) == 1  # fmt: skip
    assert "pass it alone" in capsys.readouterr().err


def test_layers_that_gain_most_are_taken_first(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", experts=2, layers=5)
    config = ModelConfig.from_dir(model)
    gains = {1: 0.1, 2: 0.4, 3: -0.1, 4: 0.3}
    room = [w4_layers_for_bits(config, bits, gains) for bits in (2.7, 3.2, 3.7, 4.1, 9)]
    assert room == [(), (2,), (2, 4), (1, 2, 4), (1, 2, 4)]
    with pytest.raises(ConfigError, match=r"--bits: found 1.5, expected at least 2\.\d+"):
        w4_layers_for_bits(config, 1.5, gains)


def test_layers_may_be_named_and_a_range_is_written_as_everybody_reads_it(
    tmp_path: Path,
) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", experts=2, layers=4)
    for layers, named, end in (("2", [2], 0), ("3,1", [1, 3], 1), ("1,2", None, 2)):
        output = tmp_path / layers.replace(",", "-")
        assert cli.run(["quantize", "--quiet", "--model", str(model), "--output", str(output),
                        "--int4-layers", layers]) == 0  # fmt: skip
        text = json.loads((output / "config.json").read_text(encoding="utf-8"))
        w4 = text["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]
        assert w4.get("layers") == named
        assert w4["quant_end_layer"] == end
        checkpoint = Checkpoint.open(output)
        for layer in (1, 2, 3):
            key = f"ernie.layers.{layer}.mlp.experts.0.down_proj.super_scales"
            int4 = str(layer) in layers.split(",")
            assert (key in list(checkpoint)) != int4
            assert checkpoint.config.expert_kind(layer) == ("int4" if int4 else "ccq")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int4-layers", "0"], "int4 layers: found 0, expected MoE layers, 1 to 2"),
        (["--int4-layers", "1;2"], "--int4-layers: found '1;2', expected numbers such as 1,4,5"),
        (["--int4-layers", "1", "--bits", "3"], "names the layers that --bits would choose"),
        (["--int4-layers", "1", "--moe-w4-end-layer", "1"], "leave out --moe-w4-end-layer"),
        (["--int4-layers", "1", "--scheme", "2bits"], "chooses layers under --scheme w4w2"),
        (["--int4-layers", "measured", "--bits", "3"], "measured needs --calibration"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", experts=2)
    command = ["quantize", "--model", str(model), "--output", str(tmp_path / "out"), *options]
    assert cli.run(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_none_is_refused_when_it_is_read(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", kind="w4w2", experts=2)
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    w4 = config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]
    for wrong in ("1", [1.5], [-1], [True]):
        w4["layers"] = wrong
        file.write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(
            ConfigError, match=r"layers: found .* expected a list of decoder layers"
        ):
            ModelConfig.from_dir(model)
