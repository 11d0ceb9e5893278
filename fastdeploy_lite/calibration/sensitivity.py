"""What each layer's routed experts cost the model at 4 and at 2 bits, measured before encoding.

One layer at a time is rounded, all others stay bf16; the figure is how far the distribution of the
next token then is from the bf16 model's. Layers are read once: behind each, the streams that it
spoilt join those of the layers before, and all run on together as if they were more text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fastdeploy_lite.calibration.encoder import read_dense
from fastdeploy_lite.calibration.experts import add_outputs, group_by_expert
from fastdeploy_lite.calibration.gradients import log_softmax
from fastdeploy_lite.calibration.streams import ArrayF32, LayerRunner
from fastdeploy_lite.calibration.trainable import TrainableModel
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.convert import quantize_matrix

TOKENS = 2048
"""Of the text that are run: two streams a layer of so many rows are held in float32."""
KINDS = ("int4", "ccq")
_LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class LayerNats:
    """Nats a token from the bf16 model when the experts of `layer` alone are rounded."""

    layer: int
    int4: float
    ccq: float

    @property
    def gain(self) -> float:
        """What int4 in place of 2 bits saves."""
        return self.ccq - self.int4


def measure_layers(
    checkpoint: Checkpoint,
    windows: Sequence[npt.NDArray[np.int32]],
    *,
    tokens: int = TOKENS,
    progress: bool = True,
) -> list[LayerNats]:
    """Measure every MoE layer on the first `tokens` tokens of the text.

    The 2-bit form is that of one fixed code, which errs by a twentieth more than the search and
    takes a third of its time. Raises CheckpointError of the model's files.
    """
    text = _first(windows, tokens)
    streams, spoilt = _Streams(checkpoint, text).run(progress)
    nats = _divergences(checkpoint, streams, sum(map(len, text)))
    found = dict(zip(spoilt, nats, strict=True))
    layers = dict.fromkeys(layer for layer, _ in spoilt)
    return [LayerNats(layer, *(found[layer, kind] for kind in KINDS)) for layer in layers]


def _first(windows: Sequence[npt.NDArray[np.int32]], tokens: int) -> list[npt.NDArray[np.int32]]:
    found: list[npt.NDArray[np.int32]] = []
    left = tokens
    for window in windows:
        if left > 0:
            found.append(window[:left])
            left -= len(found[-1])
    return found


class _Streams:
    """The bf16 residual stream and, below it, one for every layer and format so far."""

    def __init__(self, checkpoint: Checkpoint, text: list[npt.NDArray[np.int32]]) -> None:
        self.checkpoint = checkpoint
        self._runner = LayerRunner(checkpoint, [len(window) for window in text])
        self._ids = np.concatenate(text)
        self._experts: dict[int, dict[tuple[str, int], Linear]] = {}
        for linear in model_linears(checkpoint.config):
            if linear.expert is not None:
                layer = self._experts.setdefault(linear.layer, {})
                layer[linear.role, linear.expert] = linear

    def run(self, progress: bool) -> tuple[ArrayF32, list[tuple[int, str]]]:
        """Streams [n + 1, T, H] behind the last layer, and the layer and format of each of n."""
        streams = self._runner.embed(self._ids)
        spoilt: list[tuple[int, str]] = []
        layers = range(self.checkpoint.config.num_hidden_layers)
        for layer in tqdm(layers, desc="Measuring Layers", unit="layer", disable=not progress):
            streams = self._behind(layer, streams)
            if layer in self._experts:
                spoilt += [(layer, kind) for kind in KINDS]
        return streams.reshape(len(spoilt) + 1, len(self._ids), -1), spoilt

    def _behind(self, layer: int, streams: ArrayF32) -> ArrayF32:
        """All streams behind `layer`, those that it spoils last."""
        entered = self._runner.enter_mlp(layer, streams, {})
        before = entered.residual + entered.dense
        if layer not in self._experts:
            return before
        count, tokens = self.checkpoint.config.moe_num_experts, len(self._ids)
        first = group_by_expert(entered.experts[:tokens], entered.weights[:tokens], count)
        found = [before]
        for kind in KINDS:
            part = before[:tokens].copy()
            add_outputs(part, entered.x[:tokens], first, partial(self._read, layer, kind))
            found.append(part)
        everything = group_by_expert(entered.experts, entered.weights, count)
        add_outputs(before, entered.x, everything, partial(self._read, layer, None))
        return np.concatenate(found)

    def _read(self, layer: int, kind: str | None, name: str, expert: int) -> ArrayF32:
        weight = read_dense(self.checkpoint, self._experts[layer][name, expert])
        if kind is None:
            return weight
        return quantize_matrix(kind, weight, codes=CODES[:1])[1]


def _divergences(checkpoint: Checkpoint, streams: ArrayF32, tokens: int) -> list[float]:
    """Nats a token from the first of the streams [n + 1, T, H] to each of the others."""
    model = TrainableModel(checkpoint)
    rows = max(1, _LOGITS_AT_ONCE // checkpoint.config.vocab_size)
    totals = np.zeros(len(streams) - 1)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        wanted = _log_softmax(model, streams[0, part])
        for index, stream in enumerate(streams[1:]):
            found = _log_softmax(model, stream[part])
            totals[index] += float((np.exp(wanted) * (wanted - found)).sum())
    return [float(total) / tokens for total in totals]


def _log_softmax(model: TrainableModel, stream: ArrayF32) -> npt.NDArray[np.float64]:
    return log_softmax(model.logits(np.ascontiguousarray(stream)).astype(np.float64))
