"""`quantize --tune`: scales and norms learn to give what the bf16 model gives.

Bytes stay as they are. The scale of every column, in all formats, and every norm gain move so that
the distribution of the next token comes nearest to that of the bf16 model (Kullback-Leibler), by
Adam over the calibration text. Some windows are held back: they tell what it gained, and a run that
gained nothing there changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fastdeploy_lite.calibration.gradients import Divergence, host
from fastdeploy_lite.calibration.trainable import TrainableModel
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import resolve_kind
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.quantization.journal import FileTensor
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.utils.errors import ConfigError

ArrayF32 = npt.NDArray[np.float32]
Gains = dict[str, ArrayF32]
Windows = Sequence[npt.NDArray[np.int32]]

LARGEST_GAIN = 0.9
"""No scale changes sign or comes near zero."""
LOGITS_AT_ONCE = 1 << 23
"""Values of one block of logits: bounds what the head needs."""
_BETAS, _EPSILON = (0.9, 0.98), 1e-8
_WARMUP = 0.1


@dataclass(frozen=True)
class TuningSettings:
    """How scales are learnt; every field changes the result.

    Attributes:
        epochs: passes over the text.
        windows: of the text in a step.
        learning_rate: largest step of a gain, relative; it rises for a tenth of the steps, then
            falls to zero as a cosine.
        held_back: share of the windows that is not learnt from.
    """

    epochs: int = 2
    windows: int = 2
    learning_rate: float = 3e-3
    held_back: float = 0.06


@dataclass
class Tuned:
    """Gains by module and norm key, and nats from the bf16 model on the windows held back."""

    before: float
    after: float
    steps: int
    gains: Gains = field(default_factory=dict)


def check_windows(windows: Windows) -> None:
    """Raise ConfigError where there are too few to learn from and to judge by."""
    if len(windows) < 2:
        raise ConfigError(
            f"--tune: found {len(windows)} window of text, expected at least two: one is held "
            "back to judge by"
        )


class Tuner:
    """Learns the gains of one quantised model from one text."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        reference: ArrayF32,
        settings: TuningSettings,
    ) -> None:
        """Prepare.

        Args:
            checkpoint: the quantised model.
            windows: token ids.
            reference: [T, H], the bf16 model's residual stream behind its last layer, the rows of
                one window after another.
            settings: see there.

        Raises:
            ConfigError: fewer than two windows.
        """
        check_windows(windows)
        self.model, self.settings = TrainableModel(checkpoint), settings
        starts = np.cumsum([0, *map(len, windows)])
        self._text = [
            (window, reference[start : start + len(window)])
            for window, start in zip(windows, starts, strict=False)
        ]
        back = max(1, round(settings.held_back * len(windows)))
        self._held_back, self._learnt = self._text[:back], self._text[back:]

    def run(self, seed: int, progress: bool) -> Tuned:
        """Learn; gains are empty if the windows held back say that nothing was gained."""
        before = self.divergence()
        plan = list(self._plan(np.random.default_rng(seed)))
        optimiser = _Adam(self.model.gains)
        for gain in self.model.gains.values():
            gain.stop_gradient = False
        bar = tqdm(plan, desc="Tuning Scales", unit="step", disable=not progress)
        for step, chosen in enumerate(bar):
            loss = self._step(chosen)
            optimiser.step(self.settings.learning_rate * schedule(step, len(plan)))
            bar.set_postfix_str(f"{loss:.4f} nats")
        after = self.divergence()
        found = Tuned(before, after, len(plan))
        if after < before:
            found.gains = {key: gain.numpy().copy() for key, gain in self.model.gains.items()}
        return found

    def divergence(self) -> float:
        """Mean nats a token from the bf16 model on the windows held back."""
        total = count = 0.0
        with paddle.no_grad():
            for window, reference in self._held_back:
                stream = self.model.embed(window[None])
                for layer in self.model.layers:
                    stream = self.model.run(layer, stream)
                rows = stream.reshape([-1, stream.shape[-1]])
                for part in self._blocks(len(window)):
                    total += float(self._loss(rows[part], reference[part]))
                count += len(window)
        return total / count

    def _plan(self, random: np.random.Generator) -> Iterator[list[int]]:
        """Windows of one length for every step: all of them once an epoch, in random order."""
        for _ in range(self.settings.epochs):
            by_length: dict[int, list[int]] = {}
            for index in random.permutation(len(self._learnt)):
                by_length.setdefault(len(self._learnt[index][0]), []).append(int(index))
            size = self.settings.windows
            steps = [
                same[at : at + size]
                for same in by_length.values()
                for at in range(0, len(same), size)
            ]
            for index in random.permutation(len(steps)):
                yield steps[int(index)]

    def _step(self, chosen: Sequence[int]) -> float:
        """Leave the gradients of a step in the gains; mean nats a token."""
        model = self.model
        ids = np.stack([self._learnt[index][0] for index in chosen])
        reference = np.concatenate([self._learnt[index][1] for index in chosen])
        inputs = []
        with paddle.no_grad():
            stream = model.embed(ids)
            for layer in model.layers:
                inputs.append(stream)
                stream = model.run(layer, stream)
        loss, gradient = self._head(stream, reference)
        for layer in reversed(model.layers):
            entered = inputs.pop().detach()
            entered.stop_gradient = False
            paddle.autograd.backward([model.run(layer, entered)], [gradient])
            gradient = entered.grad.detach()
        return loss

    def _head(self, stream: Any, reference: ArrayF32) -> tuple[float, Any]:
        """Mean loss, and its gradient by the stream [B, T, H] behind the last layer."""
        rows = stream.reshape([-1, stream.shape[-1]]).detach()
        total, gradients = 0.0, []
        for part in self._blocks(len(reference)):
            block = rows[part].detach()
            block.stop_gradient = False
            loss = self._loss(block, reference[part]) / len(reference)
            loss.backward()
            total += float(loss)
            gradients.append(block.grad.detach())
        return total, paddle.concat(gradients).reshape(stream.shape)

    def _loss(self, rows: Any, reference: ArrayF32) -> Any:
        """Sum over tokens of the divergence from the bf16 model."""
        model = self.model
        with paddle.no_grad():
            wanted = host(model.enter_head(paddle.to_tensor(reference), learnt=False))
        return Divergence.apply(model.enter_head(rows), wanted, model.head)

    def _blocks(self, count: int) -> Iterator[slice]:
        size = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))


class _Adam:
    """Adam on all gains; takes the gradients and leaves none."""

    def __init__(self, gains: dict[str, Any]) -> None:
        self._gains, self._count = gains, 0
        self._mean = {key: np.zeros(gain.shape, np.float32) for key, gain in gains.items()}
        self._square = {key: np.zeros(gain.shape, np.float32) for key, gain in gains.items()}

    def step(self, rate: float) -> None:
        self._count += 1
        first, second = (1 - beta**self._count for beta in _BETAS)
        for key, gain in self._gains.items():
            if gain.grad is None:  # an expert without tokens
                continue
            gradient = gain.grad.numpy()
            mean, square = self._mean[key], self._square[key]
            mean += (1 - _BETAS[0]) * (gradient - mean)
            square += (1 - _BETAS[1]) * (np.square(gradient) - square)
            move = rate * (mean / first) / (np.sqrt(square / second) + _EPSILON)
            moved = (gain.numpy() - move).clip(-LARGEST_GAIN, LARGEST_GAIN)
            gain.set_value(moved.astype(np.float32))
            gain.clear_gradient()


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate in a step: up in a line, down as a cosine."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fold(checkpoint: Checkpoint, gains: Gains) -> dict[str, FileTensor]:
    """Tensors of the quantised checkpoint with gains in them, by key; others stay as they are."""
    keys = dict.fromkeys(gains)
    scales = {"ccq": "super_scales", "int4": "weight_scale", "int8": "weight_scale"}
    found = {}
    for linear in model_linears(checkpoint.config):
        if keys.pop(linear.module, 0) is None:
            key = f"{linear.module}.{scales[resolve_kind(checkpoint, linear)]}"
            found[key] = _scaled(checkpoint, key, gains[linear.module])
    for key in keys:
        found[key] = _scaled(checkpoint, key, gains[key])
    return found


def _scaled(checkpoint: Checkpoint, key: str, gain: ArrayF32) -> FileTensor:
    source = checkpoint.get(key)
    if source.dtype == "BF16":
        values = bfloat16_to_float32(source.data).reshape(-1) * (1 + gain)
        return float32_to_bfloat16(values).reshape(source.data.shape), source.dtype
    scaled = (source.data.reshape(-1) * (1 + gain)).astype(source.data.dtype)
    return scaled.reshape(source.data.shape), source.dtype
