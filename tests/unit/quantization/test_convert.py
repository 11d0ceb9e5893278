"""From a bf16 checkpoint to the published form: contents, formats, layers, refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from decoded_weights import decoded
from tiny_model import (
    TOKENIZER_FILES,
    tiny_config,
    tiny_tensors,
    write_tensors,
    write_tiny_model,
)

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import model_linears, verify
from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32
from fastdeploy_lite.entrypoints.cli import quantize as cli
from fastdeploy_lite.formats.ccq import to_stored_order, to_true_order
from fastdeploy_lite.formats.tiles import unpack_int4, unpack_int8
from fastdeploy_lite.quantization import ccq_search, convert
from fastdeploy_lite.quantization.card import Encoded
from fastdeploy_lite.quantization.convert import quantize_checkpoint, quantize_matrix
from fastdeploy_lite.quantization.weight_only import dequantize
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

# One code makes the encoder twenty times faster; the search of codes has its own tests.
QUIET = {"progress": False, "codes": [(120.94422, 1262.3779)]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("source") / "bf16", kind="bf16", layers=4, experts=2
    )


@pytest.mark.parametrize(
    ("scheme", "end", "expected"),
    [
        ("w4w2", 2, ["int4", "int4", "ccq"]),
        ("w4w2", None, ["int4", "ccq", "ccq"]),
        ("w4w2", -1, ["ccq"] * 3),
        ("2bits", None, ["ccq"] * 3),
        ("wint4", None, ["int4"] * 3),
    ],
)
def test_output_is_a_complete_model_of_the_asked_formats(
    source: Path, tmp_path: Path, scheme: str, end: int | None, expected: list[str]
) -> None:
    report = quantize_checkpoint(source, tmp_path / "out", scheme=scheme, w4_end_layer=end, **QUIET)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    verify(after)
    assert [after.config.expert_kind(layer) for layer in (1, 2, 3)] == expected
    assert after.config.linear_kind == "int8"
    assert set(report.kinds) == {"int8", *expected}
    assert report.output_bytes == after.nbytes
    assert report.input_bytes == before.nbytes
    limits = {"int8": 1e-4, "int4": 0.02, "ccq": 0.109}
    kinds = {linear.module: linear.kind for linear in model_linears(after.config)}
    original = decoded(before)
    for module, matrix in decoded(after).items():
        error = ((matrix - original[module]) ** 2).sum() / (original[module] ** 2).sum()
        assert error < limits[kinds[module]], module
    for key in before:
        if f"{key.rsplit('.', 1)[0]}.quant_weight" not in after:
            np.testing.assert_array_equal(after.get(key).data, before.get(key).data)
            assert after.info(key).dtype == before.info(key).dtype


def test_other_linears_may_be_int4_on_request(source: Path, tmp_path: Path) -> None:
    """The numbers are those of int4 experts' rounding; the model loads and is smaller."""
    output = tmp_path / "out"
    report = quantize_checkpoint(source, output, scheme="wint4", dense="wint4", **QUIET)
    plain = quantize_checkpoint(source, tmp_path / "plain", scheme="wint4", **QUIET)
    before, after = Checkpoint.open(source), Checkpoint.open(output)
    verify(after)
    assert after.config.linear_kind == "int4"
    assert set(report.kinds) == {"int4"}
    assert report.output_bytes < plain.output_bytes
    original = decoded(before)
    for module, matrix in decoded(after).items():
        expected = quantize_matrix("int4", original[module])[1]
        np.testing.assert_array_equal(matrix, expected)


def test_config_has_the_published_shape(source: Path, demo_dir: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", scheme="2bits", **QUIET)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    published = json.loads((demo_dir / "config.json").read_text())["quantization_config"]
    published["moe_quant_config"]["moe_w2_quant_config"]["quant_end_layer"] = 3
    published["moe_quant_config"]["moe_w2_quant_config"]["row_order"] = "permuted"
    assert found.pop("quantization_config") == published
    assert found.pop("is_quantized") is True
    assert found == {k: v for k, v in original.items() if k not in ("is_quantized",)}
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_result_is_deterministic_and_independent_of_threads_and_shards(
    source: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    many = tmp_path / "many"
    quantize_checkpoint(source, one, scheme="2bits", workers=1, **QUIET)
    quantize_checkpoint(source, many, scheme="2bits", workers=3, shard_bytes=1 << 18, **QUIET)
    assert len(list(many.glob("*.safetensors"))) > 1
    first, second = Checkpoint.open(one), Checkpoint.open(many)
    assert set(first) == set(second)
    for key in first:
        np.testing.assert_array_equal(first.get(key).data, second.get(key).data)


class CardOfTheCpu:
    """Encodes as a card would, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, weight: np.ndarray, *, codes: object, row_order: str) -> Encoded:
        assert weight.dtype == np.uint16, "a card takes the file's bfloat16 as it is"
        self.calls += 1
        wide = bfloat16_to_float32(weight)
        found = ccq_search.encode(to_stored_order(wide, row_order), codes=codes)
        lost = to_true_order(found.decode(), row_order) - wide
        energy = float(np.square(wide, dtype=np.float64).sum())
        return Encoded(found, energy, float(np.square(lost, dtype=np.float64).sum()))


def test_a_card_searches_the_codes_and_the_files_stay_the_same(
    source: Path, tmp_path: Path
) -> None:
    card = CardOfTheCpu()
    with_card = quantize_checkpoint(source, tmp_path / "card", scheme="2bits", card=card, **QUIET)
    without = quantize_checkpoint(source, tmp_path / "cpu", scheme="2bits", **QUIET)
    assert card.calls == 3 * 2 * 2, "two matrices of two experts in three layers"
    assert weights(tmp_path / "card") == weights(tmp_path / "cpu")
    assert with_card.kinds == without.kinds


def test_unfused_inputs_and_extra_tensors(tmp_path: Path) -> None:
    """gate/up and q/k/v may be separate; draft and statistics tensors pass through unchanged."""
    config = tiny_config("bf16")
    tensors = tiny_tensors(config)
    fused = dict(tensors)
    key = "ernie.layers.1.mlp.experts.0.up_gate_proj.weight"
    array, dtype = fused.pop(key)
    half = array.shape[1] // 2
    prefix = "ernie.layers.1.mlp.experts.0"
    fused[f"{prefix}.gate_proj.weight"] = (array[:, :half].copy(), dtype)
    fused[f"{prefix}.up_proj.weight"] = (array[:, half:].copy(), dtype)
    usage = np.arange(8, dtype=np.int64)
    fused["ernie.layers.1.mlp.moe_statics.expert_usage"] = (usage, "I64")
    write_tensors(tmp_path / "plain", config, tensors)
    write_tensors(tmp_path / "split", config, fused)
    for name in ("plain", "split"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-out", scheme="2bits", **QUIET)
    plain, split = Checkpoint.open(tmp_path / "plain-out"), Checkpoint.open(tmp_path / "split-out")
    assert set(split) - set(plain) == {"ernie.layers.1.mlp.moe_statics.expert_usage"}
    for name in plain:
        np.testing.assert_array_equal(plain.get(name).data, split.get(name).data)


def test_dropped_tail_layers_are_left_out(tmp_path: Path) -> None:
    config = tiny_config("bf16", layers=4)
    tensors = tiny_tensors(config)
    write_tensors(tmp_path / "in", {**config, "remove_tail_layer": 1}, tensors)
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", scheme="2bits", **QUIET)
    out = Checkpoint.open(tmp_path / "out")
    verify(out)
    assert out.config.num_hidden_layers == 3
    assert not any(key.startswith("ernie.layers.3.") for key in out)


def test_matrix_in_file_form_decodes_to_what_is_reported() -> None:
    weight = np.random.default_rng(0).standard_normal((128, 16)).astype(np.float32)
    for kind, unpack in (("int8", unpack_int8), ("int4", unpack_int4)):
        tensors, meant = quantize_matrix(kind, weight)
        scale = bfloat16_to_float32(tensors["weight_scale"][0])
        stored = unpack(tensors["quant_weight"][0])
        np.testing.assert_array_equal(dequantize(stored, scale), meant)


def test_already_quantised_input_is_refused(demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found 'wint2', expected an unquantised"):
        quantize_checkpoint(demo_dir, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_output_folders_are_protected(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not empty.*--force"):
        quantize_checkpoint(source, out, **QUIET)
    quantize_checkpoint(source, out, scheme="wint4", force=True, **QUIET)
    assert (out / "notes.txt").read_text() == "mine"
    quantize_checkpoint(source, out, scheme="2bits", force=True, **QUIET)
    verify(Checkpoint.open(out))
    with pytest.raises(CheckpointError, match="found a file"):
        quantize_checkpoint(source, out / "config.json", force=True, **QUIET)


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        ("m", "m", "m: this would write into the input folder"),
        ("m", "m/../m", "this would write into the input folder"),
        ("m", "link", "link: this would write into the input folder"),
        ("m", "m/2bits", "2bits: this lies in the input folder"),
        ("out/rank0", "out", "out: this lies in the input folder .*, or that lies in it"),
        ("m", "other", "rank0: this would write into the input folder"),
        ("q.unfinished", "q", "q.unfinished: this would write into the input folder"),
    ],
)
@pytest.mark.parametrize("scheme", ["wint4", "2bits"])
def test_the_input_is_never_touched(
    source: Path, tmp_path: Path, scheme: str, model: str, output: str, message: str
) -> None:
    """With --force, too: it removes weights in the output folder and in its rank folders."""
    shutil.copytree(source, tmp_path / model)
    (tmp_path / "other").mkdir()
    for link in (tmp_path / "link", tmp_path / "other" / "rank0"):
        link.symlink_to(tmp_path / model)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(
            tmp_path / model, tmp_path / output, scheme=scheme, force=True, **QUIET
        )  # fmt: skip
    kept = {path.name: path.read_bytes() for path in (tmp_path / model).iterdir()}
    assert kept == {path.name: path.read_bytes() for path in source.iterdir()}


def test_the_folder_of_finished_layers_must_be_its_own(source: Path, tmp_path: Path) -> None:
    """It is deleted in the end; a model in the output folder stays when it is refused."""
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("mine")
    quantize_checkpoint(source, tmp_path / "out", scheme="wint4", **QUIET)
    for content, message in (
        (None, "found thesis.txt and no settings.json, expected an unfinished conversion"),
        ("{", "settings.json: damaged"),
        ("{}", "begun with codes None, now"),
    ):
        if content is not None:
            (tmp_path / "out.unfinished" / "settings.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            quantize_checkpoint(source, tmp_path / "out", scheme="2bits", force=True, **QUIET)
    assert (tmp_path / "out.unfinished" / "thesis.txt").read_text() == "mine"
    verify(Checkpoint.open(tmp_path / "out"))
    shutil.rmtree(tmp_path / "out.unfinished")
    (tmp_path / "out.unfinished").touch()
    with pytest.raises(ConfigError, match="found a file where finished layers wait"):
        quantize_checkpoint(source, tmp_path / "out", scheme="2bits", force=True, **QUIET)


def test_an_output_folder_may_be_the_present_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    quantize_checkpoint(source, ".", scheme="2bits", **QUIET)
    verify(Checkpoint.open(tmp_path / "here"))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"scheme": "w3"}, "scheme: found 'w3', expected one of w4w2, 2bits, wint4, wint8"),
        ({"dense": "wint2"}, "dense: found 'wint2', expected wint8 or wint4"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: found 0, expected 1 or more"),
        ({"w4_end_layer": 4}, "moe_w4_end_layer: found 4, expected -1 .* to 3"),
        ({"scheme": "2bits", "w4_end_layer": 2}, "scheme '2bits' fixes it"),
    ],
)
def test_wrong_arguments(source: Path, tmp_path: Path, arguments: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        quantize_checkpoint(source, tmp_path / "out", **arguments, **QUIET)


def test_sizes_that_the_format_cannot_hold_are_named_before_any_work(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "in", kind="bf16", moe_intermediate_size=192)
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj: found K = 192"):
        quantize_checkpoint(model, tmp_path / "out", scheme="2bits", **QUIET)
    assert not (tmp_path / "out").exists()


def model_with_a_nan(folder: Path) -> Path:
    """In the last layer's last expert, where a conversion comes late."""
    config = tiny_config("bf16")
    tensors = tiny_tensors(config)
    key = "ernie.layers.2.mlp.experts.3.down_proj.weight"
    array, dtype = tensors[key]
    array = array.copy()
    array[5, 7] = 0x7FC0
    write_tensors(folder, config, {**tensors, key: (array, dtype)})
    for name in TOKENIZER_FILES:
        shutil.copyfile(demo_path() / name, folder / name)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["--scheme", "2bits"],
        ["--scheme", "2bits", "--tensor-parallel-size", "2"],
        ["--scheme", "wint4", "--calibration", "sample"],
    ],
)
def test_a_nan_is_named_before_any_long_work(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It was found after the layers before it, which were then thrown away."""
    source = model_with_a_nan(tmp_path / "in")
    arguments = ["--model", source, "--output", tmp_path / "out", "--device", "cpu", "--quiet"]
    assert run_cli(*arguments, *options) == 1
    error = capsys.readouterr().err
    assert re.search(r"experts\.3\.down_proj\.weight: found nan at element 647 \(1 such\)", error)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_a_nan_found_on_the_way_leaves_no_model(tmp_path: Path) -> None:
    """Rounding and a card read the input once: they are there in minutes."""
    source = model_with_a_nan(tmp_path / "in")
    for options in ({"scheme": "wint4"}, {"scheme": "2bits", "card": CardOfTheCpu()}):
        with pytest.raises(CheckpointError, match=r"down_proj\.weight: found nan at element 647"):
            quantize_checkpoint(source, tmp_path / "out", **options, **QUIET)
        assert list((tmp_path / "out").iterdir()) == []
        assert not (tmp_path / "out.unfinished").exists()  # the input will be another one


@pytest.mark.parametrize("calibration", [[], ["--calibration", "sample"]])
@pytest.mark.parametrize(
    ("key", "bits"),
    [
        ("ernie.norm.weight", 0x7FC0),
        ("ernie.layers.1.post_attention_layernorm.weight", 0x7F80),
        ("ernie.layers.2.mlp.gate.weight", 0x7FC00000),
        ("ernie.layers.2.mlp.moe_statics.e_score_correction_bias", 0x7FC00000),
        ("lm_head.weight", 0x7FC0),
    ],
)
def test_a_copied_tensor_that_is_not_finite_is_named_before_any_work(
    key: str,
    bits: int,
    calibration: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model was written that nothing could load."""
    config = tiny_config("bf16", tied=False)
    tensors = tiny_tensors(config)
    array, dtype = tensors[key]
    array = array.copy()
    array.view(np.uint16 if dtype == "BF16" else np.uint32).flat[3] = bits
    write_tensors(tmp_path / "in", config, {**tensors, key: (array, dtype)})
    for name in TOKENIZER_FILES:
        shutil.copyfile(demo_path() / name, tmp_path / "in" / name)
    arguments = ["--model", tmp_path / "in", "--output", tmp_path / "out", "--device", "cpu"]
    assert run_cli(*arguments, "--quiet", *calibration) == 1
    error = capsys.readouterr().err
    assert re.search(rf"{re.escape(key)}: found (nan|inf) at element 3 \(1 such\)", error)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def run_cli(*arguments: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(a) for a in arguments]))


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--scheme", "2bits", "--code", "128.5,0.25", "--shard-size", "1MiB")
    assert run_cli("--model", source, "--output", out, *options, "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert text.startswith("2-bit codes are searched on the CPU: --device cpu\n")
    assert "ccq:" in text
    assert "int8:" in text
    scale = Checkpoint.open(out).get("ernie.layers.1.mlp.experts.0.up_gate_proj.code_scale").data
    assert (scale == np.float32(128.5)).all()
    assert run_cli("--model", source, "--output", out, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastdeploy-lite quantize: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"), [("1M", 1 << 20), ("1.5GiB", 3 << 29), ("4gb", 4 << 30), ("2097152", 2 << 20)]
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize(
    "option",
    [
        ("--shard-size", "9"), ("--shard-size", "x"), ("--code", "1"), ("--code", "1,nan"),
        ("--num-threads", "0"), ("--num-threads", "-3"), ("--calibration-tokens", "0"),
        ("--keep-every", "-1"), ("--keep-every", "nan"), ("--seed", "-1"), ("--tune", "0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_cli("--model", "a", "--output", "b", *option)
    assert f"argument {option[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ("--calibration-tokens", "5"), ("--calibration-method", "diagonal"),
        ("--keep-every", "0"), ("--seed", "1"), ("--tune", "2"),
    ],
)  # fmt: skip
def test_options_of_calibration_need_a_text(
    option: tuple[str, str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They had no effect without one, and nobody said so."""
    assert run_cli("--model", source, "--output", tmp_path / "out", *option) == 1
    error = capsys.readouterr().err
    assert option[0] in error
    assert "--calibration" in error
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--model", tmp_path / "nowhere", "--output", tmp_path / "out") == 1
    assert "nowhere': no such folder" in capsys.readouterr().err


def weights(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(folder)
    return {key: checkpoint.get(key).data.tobytes() for key in checkpoint}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    """SIGKILL once the first 2-bit layer is done; the second run does not search it again."""
    command = [
        *[sys.executable, "-m", "fastdeploy_lite", "quantize", "--model", str(source)],
        *["--scheme", "2bits"],
    ]
    journal = tmp_path / "cut.unfinished"
    with subprocess.Popen([*command, "--quiet", "--output", str(tmp_path / "cut")]) as process:
        until = time.monotonic() + 300
        while not (journal / "layer-00001.json").exists():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "cut" / "config.json").exists()
    report = quantize_checkpoint(source, tmp_path / "cut", scheme="2bits", progress=False)
    assert report.resumed_layers >= 1
    whole = quantize_checkpoint(source, tmp_path / "whole", scheme="2bits", progress=False)
    assert whole.resumed_layers == 0
    assert (report.kinds, report.output_bytes) == (whole.kinds, whole.output_bytes)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert not journal.exists()


@pytest.mark.parametrize(("kib", "resumed"), [(8, 0), (2500, 2)])
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(
    source: Path, tmp_path: Path, kib: int, resumed: int
) -> None:
    """A limit on the size of files stands for the disk: errors of both come without a name."""
    command = [
        *[sys.executable, "-m", "fastdeploy_lite", "quantize", "--model", str(source)],
        *["--scheme", "2bits", "--code", "120.94422,1262.3779", "--quiet"],
        *["--output", str(tmp_path / "out")],
    ]
    found = subprocess.run(
        ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("fastdeploy-lite quantize: [Errno 27] File too large: ")
    assert "out/model-00000.data.partial" in found.stderr
    assert found.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "out.unfinished").glob("*.partial")) == []
    report = quantize_checkpoint(source, tmp_path / "out", scheme="2bits", **QUIET)
    assert report.resumed_layers == resumed
    verify(Checkpoint.open(tmp_path / "out"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"row_order": "natural"}, "begun with quantization_config"),
        ({"codes": [(120.94422, 1262.0)]}, "begun with codes"),
        ({"dense": "wint4"}, "begun with quantization_config"),
        ({"tensor_parallel_size": 2}, "begun with "),
        ({}, "begun with model"),
    ],
)
def test_another_run_than_the_unfinished_one_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict, message: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "copy_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "out", scheme="2bits", **QUIET)
    model = source
    if not other:  # one value of one matrix, the same name and shapes
        tensors = tiny_tensors(tiny_config("bf16", layers=4, experts=2))
        key = "ernie.layers.2.mlp.experts.1.down_proj.weight"
        tensors[key][0][0, 0] ^= 1
        write_tensors(tmp_path / "model", tiny_config("bf16", layers=4, experts=2), tensors)
        model = tmp_path / "model"
    with pytest.raises(ConfigError, match=message):
        quantize_checkpoint(
            model, tmp_path / "out", scheme="2bits", force=True, **(QUIET | other)
        )  # fmt: skip


def test_rounding_keeps_nothing_for_a_restart(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", scheme="wint4", **QUIET)
    assert not (tmp_path / "out.unfinished").exists()
