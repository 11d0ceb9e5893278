"""report.json and report.html of a conversion without calibration text, through the CLI."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from decoded_weights import decoded
from tiny_model import write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import rank_linears, verify
from fastdeploy_lite.entrypoints.cli import quantize as cli
from fastdeploy_lite.formats.ccq import to_stored_order, to_true_order
from fastdeploy_lite.quantization import ccq_search, convert
from fastdeploy_lite.quantization.card import Encoded
from fastdeploy_lite.utils.arrays import bfloat16_to_float32

CODE = ("--code", "120.94422,1262.3779")  # one code is searched in no time
UNKNOWN = {"tokens", "product_error", "output_error", "stream_error"}
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "bf16"
    return write_tiny_model(folder, kind="bf16", layers=LAYERS, experts=2)


def quantize(source: Path, output: Path, *options: str, device: str = "cpu") -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    where = ["--model", str(source), "--output", str(output), "--device", device]
    return cli.run(parser.parse_args([*where, *CODE, *options]))


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def lasting(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what differs from run to run."""
    return {k: v for k, v in report.items() if k not in ("seconds", "resumed_layers")}


def energy(matrix: np.ndarray) -> float:
    return float((matrix.astype(np.float64) ** 2).sum())


def rounded_to_two_bits(weight: np.ndarray) -> tuple[float, float]:
    """Squared error and squared weights of groups of 64 rows: both, of four the second and last."""
    groups = weight.reshape(-1, 64, weight.shape[1])
    error = total = 0.0
    for group in groups if len(groups) == 2 else groups[1::2]:
        for column in group.T.astype(np.float64):
            levels = np.linspace(column.min(), column.max(), 4)
            error += (np.abs(column[:, None] - levels).min(axis=1) ** 2).sum()
            total += (column**2).sum()
    return error, total


class Facts:
    """What the files of input and output say of each linear, in plain numpy."""

    def __init__(self, source: Path, output: Path, ranks: int = 1) -> None:
        self.sums: dict[tuple[int, str], np.ndarray] = {}
        self.errors: dict[tuple[int, str, int | None], np.ndarray] = {}
        for rank in range(ranks):
            before, after = (Checkpoint.open(folder, ranks, rank) for folder in (source, output))
            original, meant = decoded(before), decoded(after)
            for linear in rank_linears(after):
                stored = [key for key in after if key.rpartition(".")[0] == linear.module]
                weight, found = original[linear.module], meant[linear.module]
                lost = rounding = energy(found - weight)
                if linear.kind == "ccq":
                    error, total = rounded_to_two_bits(weight)
                    rounding = error / total * energy(weight)
                bits = 8 * sum(after.get(key).data.nbytes for key in stored)
                sums = np.array([weight.size, bits, energy(weight), lost, rounding])
                name = linear.module.split(f"layers.{linear.layer}.")[1]
                name = name if linear.expert is None else linear.role
                for table, key in (
                    (self.sums, (linear.layer, linear.kind)),
                    (self.errors, (linear.layer, name, linear.expert)),
                ):
                    table[key] = table.get(key, 0) + sums

    def weight_error(self, *key: Any) -> tuple[float, float]:
        _, _, whole, lost, rounding = self.errors[key]
        return lost / whole, rounding / whole


def check_figures(report: Any, facts: Facts) -> None:
    names = ("weights", "bits", "squared_weights", "squared_error", "squared_rounding_error")
    seen_sums, seen_errors = set(), set()
    for layer in report["layers"]:
        number = layer["layer"]
        assert not UNKNOWN & set(layer)
        for kind, sums in layer["kinds"].items():
            found = [sums[name] for name in names]
            np.testing.assert_allclose(found, facts.sums[number, kind], rtol=1e-5)
            seen_sums.add((number, kind))
        for name, errors in layer["linears"].items():
            found = errors["weight_error"], errors["rounded_to_nearest"]
            assert found == pytest.approx(facts.weight_error(number, name, None), rel=1e-5)
            seen_errors.add((number, name, None))
        for name, columns in layer["experts"].items():
            for expert, *found in zip(
                columns["expert"], columns["weight_error"], columns["rounded_to_nearest"],
                strict=True,
            ):  # fmt: skip
                known = facts.weight_error(number, name, expert)
                assert found == pytest.approx(known, rel=1e-5)
                seen_errors.add((number, name, expert))
    assert seen_sums == set(facts.sums)
    assert seen_errors == set(facts.errors)


@pytest.mark.parametrize(
    "options",
    [
        ("--scheme", "w4w2"), ("--scheme", "2bits", "--dense", "wint4"), ("--scheme", "wint4"),
        ("--scheme", "wint8"), ("--scheme", "2bits", "--row-order", "natural"),
    ],
)  # fmt: skip
def test_figures_are_those_of_the_files(
    source: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    assert quantize(source, output, "--quiet", *options) == 0
    report, facts = report_of(output), Facts(source, output)
    check_figures(report, facts)
    files = Checkpoint.open(output)
    assert report["output_bytes"] == files.nbytes
    assert report["resumed_layers"] == 0
    total = sum(facts.sums.values())
    assert report["bits_per_weight"] == pytest.approx(total[1] / total[0])
    for kind, part in report["formats"].items():
        sums = sum(value for (_, name), value in facts.sums.items() if name == kind)
        assert part["bits_per_weight"] == pytest.approx(sums[1] / sums[0])
        assert part["relative_error"] == pytest.approx(sums[3] / sums[2], rel=1e-5)
        assert part["rounded_to_nearest"] == pytest.approx(sums[4] / sums[2], rel=1e-5)
    check_memory(report, output, kv_heads=2)
    assert report["settings"]["quantization_config"] == files.config.raw["quantization_config"]


def test_what_needs_a_text_is_said_to_be_absent(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert quantize(source, output, "--scheme", "w4w2") == 0
    assert "traffic are not in it: they need --calibration" in capsys.readouterr().out
    assert set(report_of(output)["not_measured"]) == UNKNOWN
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "No text was run through the model (--calibration)" in page
    assert "stream error" not in page.lower()
    assert "fewest tokens" not in page.lower()
    assert page.count("<svg") == 1 + LAYERS
    drawn = {}
    for layer in range(LAYERS):
        drawing = ElementTree.parse(output / "report" / f"layer-{layer:05d}.svg")
        texts = [element.text or "" for element in drawing.iter()]
        assert any("traffic and outputs not measured" in text for text in texts)
        drawn[layer] = [text for text in texts if text in ("rounded to nearest", "encoded")]
    # Gate and up, and down; int4 experts are rounded, so that there is no other row of bars.
    both = ["rounded to nearest", "encoded"]
    assert drawn == {0: [], 1: ["rounded to nearest"] * 2, 2: both * 2}


def test_ranks_are_added_up_and_memory_is_that_of_one(source: Path, tmp_path: Path) -> None:
    """Ranks hold 128 rows of down_proj, two groups: all are rounded."""
    output = tmp_path / "out"
    options = ("--scheme", "2bits", "--tensor-parallel-size", "2", "--quiet")
    assert quantize(source, output, *options) == 0
    report = report_of(output)
    check_figures(report, Facts(source, output, ranks=2))
    verify(Checkpoint.open(output, 2, 0))
    assert report["output_bytes"] == sum(file_nbytes(output / f"rank{i}")[0] for i in range(2))
    check_memory(report, output / "rank0", kv_heads=1)
    assert "each of 2 ranks" in (output / "report.html").read_text(encoding="utf-8")


def check_memory(report: Any, folder: Path, kv_heads: int) -> None:
    """Of the files in a folder, whose scales are float32 in memory, and keys and values."""
    nbytes, scales = file_nbytes(folder)
    (memory,) = report["memory"]  # the model goes no further than 512 tokens
    values = 2 * kv_heads * 64 * LAYERS * 512
    weights = nbytes + 2 * scales
    assert memory == {"context": 512, "card": weights + 2 * values, "cpu": weights + 4 * values}


def file_nbytes(folder: Path) -> tuple[int, int]:
    """Bytes of all tensors, and how many scales in bfloat16 are among them."""
    header = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header |= json.loads(opened.read(length))
    header.pop("__metadata__", None)
    sizes = {key: np.subtract(*part["data_offsets"][::-1]) for key, part in header.items()}
    scales = [
        size for key, size in sizes.items()
        if key.endswith((".weight_scale", ".super_scales")) and header[key]["dtype"] == "BF16"
    ]  # fmt: skip
    return int(sum(sizes.values())), int(sum(scales)) // 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_goes_on_reports_what_an_undisturbed_one_does(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    options = ("--scheme", "2bits", "--tensor-parallel-size", str(ranks), "--quiet")
    assert quantize(source, tmp_path / "whole", *options) == 0
    kept: list[int] = []
    save = convert.Journal.save

    def save_and_stop(self: Any, layer: int, result: Any) -> None:
        save(self, layer, result)
        kept.append(layer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.Journal, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "cut", *options)
    assert not (tmp_path / "cut" / "report.json").exists()
    assert quantize(source, tmp_path / "cut", *options) == 0
    whole, cut = report_of(tmp_path / "whole"), report_of(tmp_path / "cut")
    assert (whole["resumed_layers"], cut["resumed_layers"]) == (0, len(kept))
    assert lasting(cut) == lasting(whole)


def test_layers_that_were_kept_without_figures_are_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions kept sums alone."""
    assert quantize(source, tmp_path / "whole", "--scheme", "2bits", "--quiet") == 0
    with monkeypatch.context() as patch:
        patch.setattr(convert, "copy_companions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "cut", "--scheme", "2bits", "--quiet")
    for record in (tmp_path / "cut.unfinished").glob("layer-*.json"):
        content = json.loads(record.read_text(encoding="utf-8"))
        content["figures"] = {"input_bytes": content["figures"]["input_bytes"], "kinds": {}}
        record.write_text(json.dumps(content), encoding="utf-8")
    shutil.rmtree(tmp_path / "cut")
    assert quantize(source, tmp_path / "cut", "--scheme", "2bits", "--quiet") == 0
    cut = report_of(tmp_path / "cut")
    assert cut["resumed_layers"] == 0
    assert lasting(cut) == lasting(report_of(tmp_path / "whole"))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class CardOfTheCpu:
    """Encodes as a card would."""

    def encode(self, weight: np.ndarray, *, codes: Any, row_order: Any) -> Encoded:
        wide = bfloat16_to_float32(weight)
        found = ccq_search.encode(to_stored_order(wide, row_order), codes=codes)
        lost = to_true_order(found.decode(), row_order) - wide
        return Encoded(found, energy(wide), energy(lost))


def test_a_card_reports_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize(source, tmp_path / "cpu", "--scheme", "w4w2", "--quiet") == 0
    monkeypatch.setattr(cli.card, "find", lambda _: (CardOfTheCpu(), "a test"))
    options = ("--scheme", "w4w2", "--quiet")
    assert quantize(source, tmp_path / "card", *options, device="nvidia") == 0
    with_card, without = report_of(tmp_path / "card"), report_of(tmp_path / "cpu")
    assert with_card["settings"].pop("device") == "nvidia"
    assert lasting(with_card) == lasting(without)


def test_plots_of_a_model_that_was_replaced_are_gone(source: Path, tmp_path: Path) -> None:
    plots = tmp_path / "out" / "report"
    plots.mkdir(parents=True)
    (plots / f"layer-{LAYERS:05d}.svg").write_text("<svg/>")
    assert quantize(source, tmp_path / "out", "--scheme", "wint4", "--quiet", "--force") == 0
    assert sorted(path.name for path in plots.iterdir()) == [
        f"layer-{layer:05d}.svg" for layer in range(LAYERS)
    ]
