"""`quantize --calibration`: a checkpoint converted layer by layer under calibration text."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fastdeploy_lite.calibration.encoder import CalibratedEncoder, CalibrationSettings
from fastdeploy_lite.calibration.restart import RestartPoints
from fastdeploy_lite.calibration.sensitivity import LayerNats, measure_layers
from fastdeploy_lite.calibration.text import calibration_windows
from fastdeploy_lite.calibration.tuning import Tuner, TuningSettings, check_windows, fold
from fastdeploy_lite.checkpoint import Checkpoint, CheckpointWriter
from fastdeploy_lite.checkpoint.inventory import (
    check_dense_values,
    check_plain_values,
    plain_nbytes,
    verify,
)
from fastdeploy_lite.checkpoint.linears import Linear, check_sizes, model_linears
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization import convert
from fastdeploy_lite.quantization.budget import w4_layers_for_bits
from fastdeploy_lite.quantization.card import Card
from fastdeploy_lite.quantization.journal import (
    NOTES_FILE,
    FileTensor,
    Journal,
    LayerResult,
    Notes,
    check_folder,
)
from fastdeploy_lite.quantization.output_folder import (
    check_output,
    copy_companions,
    prepare_output,
    unfinished_folder,
)
from fastdeploy_lite.quantization.report import expert_errors, memory, totals, write
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)
DEFAULT_TOKENS = 65536
WINDOW = 1024
KEEP_EVERY = 300.0
"""Seconds of work after which the streams are written for a restart: two float32 rows a token are
many times the weights of a small model."""


@dataclass(frozen=True)
class CalibrationText:
    """Which text, how much of it, and the seed of the draw."""

    source: str
    tokens: int = DEFAULT_TOKENS
    window: int = WINDOW
    seed: int = 0


@dataclass
class CalibratedReport:
    """What a conversion did; `layers` are the figures of each, as in report.json.

    `tuning` has the nats from the bf16 model on windows held back, before and after, and the steps;
    `sensitivity` the layers as they were measured, see `LayerNats`.
    """

    seconds: float = 0.0
    resumed_layers: int = 0
    output_bytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    tuning: dict[str, float] | None = None
    sensitivity: list[dict[str, Any]] | None = None


def quantize_with_calibration(
    model_dir: str | Path,
    output_dir: str | Path,
    text: CalibrationText,
    settings: CalibrationSettings,
    *,
    scheme: convert.Scheme = "w4w2",
    w4_end_layer: int | None = None,
    w4_layers: Sequence[int] | None = None,
    dense: convert.DenseType = "wint8",
    measured_bits: float | None = None,
    tuning: TuningSettings | None = None,
    card: Card | None = None,
    shard_bytes: int = 4 << 30,
    force: bool = False,
    progress: bool = True,
    keep_every: float = KEEP_EVERY,
) -> CalibratedReport:
    """Quantise the bf16 checkpoint in `model_dir` into `output_dir`.

    Finished layers are kept in the folder `output_dir` + `.unfinished` until all are done: a run
    that was killed goes on when it is started again with the same model, text and settings, and
    ends with the same bytes; of tuning nothing is kept. Other arguments are those of
    `convert.quantize_checkpoint`.

    measured_bits: measure what each layer gains by int4 and make those int4 that gain most, so that
        the routed experts keep to so many bits a weight; in place of w4_end_layer and w4_layers.
    tuning: how scales and norms learn from the bf16 model once all is encoded; None: they do not.
    card: searches 2-bit codes and takes the products of whole matrices (`quantization.card.find`);
        None: the CPU. Sums run in another order there, so that results differ in their last bits,
        and a run goes on only on the kind of device that it began on.
    keep_every: seconds of work, in whole layers, that a killed run may lose; 0 writes the streams
    after every layer.

    Raises:
        ConfigError: arguments, text, a quantised input, or other settings than the unfinished run.
        CheckpointError: damaged input, sizes that a format cannot hold, an output folder in use.
    """
    started = time.perf_counter()
    model, output = Path(model_dir), Path(output_dir)
    checkpoint = Checkpoint.open(model)
    unfinished = unfinished_folder(output)
    order = settings.row_order
    target = partial(convert.target_config, checkpoint.config, scheme, w4_end_layer, order)
    config = target(w4_layers if measured_bits is None else (), dense)
    _check(checkpoint, config, model, output, force)
    windows = _read_text(model, checkpoint.config, text)
    if tuning is not None:
        check_windows(windows)
    report = CalibratedReport()
    if measured_bits is not None:
        chosen, report.sensitivity = _choose_int4(
            checkpoint, measured_bits, windows, unfinished, progress
        )
        config = target(chosen, dense)
    report.settings = _describe(checkpoint, windows, text, settings, config, tuning, card)
    journal = Journal(unfinished, report.settings)
    points = RestartPoints(journal, keep_every, config.num_hidden_layers, tuning is not None)
    layers = _Layers(checkpoint, config, windows, settings, points, report, card)
    layers.run(progress)
    tuned = {} if tuning is None else layers.tune(tuning, text.seed, progress)
    prepare_output(model, output, force)
    report.output_bytes = _write_model(output, layers, tuned, shard_bytes)
    copy_companions(model, output)
    report.seconds = time.perf_counter() - started
    write(output, _content(report, checkpoint, config))
    journal.remove()
    return report


def _write_model(
    output: Path, layers: _Layers, tuned: dict[str, FileTensor], shard_bytes: int
) -> int:
    """Write all tensors, those that tuning has changed in place of the encoded; their bytes."""
    nbytes = 0
    with CheckpointWriter(output, dict(layers.config.raw), shard_bytes) as writer:
        for key, array, dtype in layers.tensors():
            writer.add(key, *tuned.get(key, (array, dtype)))
            nbytes += array.nbytes
    return nbytes


def _check(
    checkpoint: Checkpoint, config: ModelConfig, model: Path, output: Path, force: bool
) -> None:
    """Refuse before hours of work what could not be written."""
    verify(checkpoint)
    check_sizes(model_linears(config), config.source)
    check_output(model, output, force)
    check_folder(unfinished_folder(output))
    check_plain_values(checkpoint)
    check_dense_values(checkpoint)


def _choose_int4(
    checkpoint: Checkpoint,
    bits: float,
    windows: list[npt.NDArray[np.int32]],
    unfinished: Path,
    progress: bool,
) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """The int4 layers that gain most within a budget, and the figures of all."""
    w4_layers_for_bits(checkpoint.config, bits, defaultdict(float))  # refused at once
    measured = _measured(checkpoint, windows, unfinished, progress)
    gains = {found.layer: found.gain for found in measured}
    layers = w4_layers_for_bits(checkpoint.config, bits, gains)
    return layers, [asdict(found) for found in measured]


def _measured(
    checkpoint: Checkpoint, windows: list[npt.NDArray[np.int32]], unfinished: Path, progress: bool
) -> list[LayerNats]:
    """Measure the layers, or read what the run that goes on has measured."""
    kept = Notes(unfinished / NOTES_FILE, _digest(checkpoint, windows))
    found = kept.read()
    if found is None:
        measured = measure_layers(checkpoint, windows, progress=progress)
        kept.write([asdict(layer) for layer in measured])
        return measured
    return [LayerNats(**layer) for layer in found]


class _Layers:
    """The layers of one conversion: from the journal, or encoded and then kept there."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        windows: list[npt.NDArray[np.int32]],
        settings: CalibrationSettings,
        points: RestartPoints,
        report: CalibratedReport,
        card: Card | None,
    ) -> None:
        self._card = card
        self.checkpoint, self.config, self.journal = checkpoint, config, points.journal
        self._windows, self._settings, self._report = windows, settings, report
        self._points = points
        self._linears: dict[int, list[Linear]] = {}
        for linear in model_linears(config):
            self._linears.setdefault(linear.layer, []).append(linear)

    def run(self, progress: bool) -> None:
        """Encode what is not there yet."""
        self._report.layers, state = self._points.resume()
        done = self._report.resumed_layers = len(self._report.layers)
        if done == self.config.num_hidden_layers:
            return
        encoder = CalibratedEncoder(self.checkpoint, self._windows, self._settings, self._card)
        if state:
            encoder.restore(state)
        layers = range(done, self.config.num_hidden_layers)
        bar = tqdm(layers, desc="Quantizing Layers", unit="layer", disable=not progress)
        for layer in bar:
            result = encoder.encode_layer(layer, self._linears[layer])
            self._points.save(layer, result)
            self._report.layers.append(result.figures)
            bar.set_postfix_str(f"stream error {result.figures['stream_error']:.4f}")

    def tune(self, settings: TuningSettings, seed: int, progress: bool) -> dict[str, FileTensor]:
        """Let scales and norms of the encoded layers learn; the tensors that change, by key."""
        draft = self.journal.folder / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        with CheckpointWriter(draft, dict(self.config.raw)) as writer:
            for key, array, dtype in self.tensors():
                writer.add(key, array, dtype)
        last = self.journal.load(self.config.num_hidden_layers - 1)
        if last is None or not last.state:
            raise CheckpointError(f"{self.journal.folder}: changed while it was in use")
        quantized = Checkpoint.open(draft)
        tuner = Tuner(quantized, self._windows, last.state["reference"], settings)
        found = tuner.run(seed, progress)
        self._report.tuning = {"before": found.before, "after": found.after, "steps": found.steps}
        return fold(quantized, found.gains)

    def tensors(self) -> Iterator[tuple[str, Any, str]]:
        """All tensors of the output, in the order in which a loader wants them."""
        for item in convert.plan(self.checkpoint, self.config):
            if isinstance(item, str):
                source = self.checkpoint.get(item)
                yield item, source.data, source.dtype
                self.checkpoint.release()
                continue
            kept = self.journal.load(item[0].layer) or LayerResult({})
            for linear in item:
                prefix = f"{linear.module}."
                for key, (array, dtype) in kept.tensors.items():
                    if key.startswith(prefix):
                        yield key, array, dtype


def _read_text(
    model: Path, config: ModelConfig, text: CalibrationText
) -> list[npt.NDArray[np.int32]]:
    if text.tokens < 2:
        raise ConfigError(f"calibration tokens: found {text.tokens}, expected at least 2")
    if text.seed < 0:
        raise ConfigError(f"seed: found {text.seed}, expected 0 or more")
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(model))
    length = min(text.window, config.max_position_embeddings)
    windows = calibration_windows(tokenizer, text.source, text.tokens, length, text.seed)
    if not windows:
        raise ConfigError(f"{text.source}: found fewer than two tokens, expected text")
    largest = max(int(window.max()) for window in windows)
    if largest >= config.vocab_size:
        raise ConfigError(
            f"{model}: the tokenizer gives id {largest}, the model has {config.vocab_size} rows"
        )
    found = sum(map(len, windows))
    if found < config.hidden_size:
        _log.warning(
            "calibration: %d tokens are fewer than the %d inputs of a linear: how these hang "
            "together cannot be known, and the text may do more harm than good; use more",
            found,
            config.hidden_size,
        )
    return windows


def _describe(
    checkpoint: Checkpoint,
    windows: list[npt.NDArray[np.int32]],
    text: CalibrationText,
    settings: CalibrationSettings,
    config: ModelConfig,
    tuning: TuningSettings | None,
    card: Card | None,
) -> dict[str, Any]:
    """Everything that the result depends on, for the journal and the report."""
    described = {
        "calibration": text.source,
        "calibration_tokens": sum(map(len, windows)),
        "seed": text.seed,
        "window": text.window,
        **asdict(settings),
        "quantization_config": config.raw["quantization_config"],
        "model_and_text": _digest(checkpoint, windows),
    }
    if tuning is not None:
        described["tuning"] = asdict(tuning)
    if card is not None:
        described["device"] = "nvidia"
    return described


def _digest(checkpoint: Checkpoint, windows: list[npt.NDArray[np.int32]]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.tobytes())
    digest.update(convert.model_digest(checkpoint).encode())
    return digest.hexdigest()


def _content(report: CalibratedReport, checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """What report.json holds."""
    formats = totals(report.layers)
    weights = sum(part["weights"] for part in formats.values())
    return {
        **asdict(report),
        "seconds": round(report.seconds, 1),
        "formats": formats,
        "bits_per_weight": sum(part["bits"] for part in formats.values()) / weights,
        "memory": memory(config, plain_nbytes(checkpoint)),
    }


def summary(report: CalibratedReport) -> str:
    """A line on size and time, and one for each format, as the data-free conversion prints."""
    lines = [f"{report.output_bytes / (1 << 20):.1f} MiB in {report.seconds:.1f} s"]
    for name, part in totals(report.layers).items():
        lines.append(
            f"{name:>5}: {part['weights'] / 1e6:10.2f} M weights, {part['bits_per_weight']:.3f} "
            f"bits each, relative squared error of weights {part['relative_error']:.5f}"
        )
    for name, (encoded, rounded) in expert_errors(report.layers).items():
        lines.append(
            f"{name} of experts: products off by {encoded:.4f} of their square, {rounded:.4f} "
            "rounded to nearest"
        )
    worst = max((layer["stream_error"] for layer in report.layers), default=0.0)
    lines.append(f"the residual stream is off by {worst:.4f} of its square at most")
    if report.sensitivity is not None:
        ranked = sorted(report.sensitivity, key=lambda row: row["int4"] - row["ccq"])
        lines.append(
            "nats that int4 saves, by layer: "
            + ", ".join(f"{row['layer']}: {row['ccq'] - row['int4']:.4f}" for row in ranked)
        )
    if report.tuning is not None:
        lines.append(
            f"tuned: {report.tuning['after']:.4f} nats from the bf16 model on windows held back, "
            f"{report.tuning['before']:.4f} before"
        )
    return "\n".join([*lines, "see report.html in the output folder"])
