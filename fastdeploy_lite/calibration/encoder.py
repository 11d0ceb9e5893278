"""Layers of a checkpoint encoded under the activations of calibration text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import formats
from fastdeploy_lite.calibration.experts import (
    LayerEncoding,
    Routed,
    add_outputs,
    group_by_expert,
)
from fastdeploy_lite.calibration.input_moments import InputMoments
from fastdeploy_lite.calibration.streams import ArrayF32, LayerRunner, Made, MlpInput
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import read_linear
from fastdeploy_lite.formats.ccq import (
    CCQWeight,
    RowOrder,
    to_stored_order,
    to_true_order,
)
from fastdeploy_lite.formats.tiles import pack_int4, pack_int8
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, int_hessian
from fastdeploy_lite.quantization.card import Card
from fastdeploy_lite.quantization.convert import ccq_tensors
from fastdeploy_lite.quantization.journal import FileTensor, LayerResult
from fastdeploy_lite.quantization.nearest import round_to_nearest
from fastdeploy_lite.quantization.products import HOST, Products
from fastdeploy_lite.quantization.weight_only import IntWeight, quantize_int4, quantize_int8
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.utils.errors import CheckpointError

UP = "up_gate_proj"
METHODS = ("data-free", "diagonal", "hessian", "corrected")
"""What the encoder knows, from nothing to everything: see docs/quantize.md."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How a checkpoint is calibrated; every field changes the result.

    Attributes:
        method: one of METHODS.
        candidates, descents: see `ccq_hessian.encode`.
        row_order: of the rows of 2-bit experts in the files.
    """

    method: str = "hessian"
    candidates: int = 2
    descents: int = ccq_hessian.DESCENTS
    row_order: RowOrder = "permuted"


@dataclass(frozen=True)
class EncodedMatrix:
    """One matrix: its tensors by suffix, and what readers decode, in true row order."""

    tensors: dict[str, FileTensor]
    decoded: ArrayF32


class CalibratedEncoder:
    """Encodes decoder layers in order; the streams move on with each."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[npt.NDArray[np.int32]],
        settings: CalibrationSettings,
        card: Card | None = None,
    ) -> None:
        """Embed the text. Raises ConfigError and CheckpointError of the model's files.

        Args:
            checkpoint: the bf16 model.
            windows: token ids.
            settings: of the encoder.
            card: searches 2-bit codes and takes the products of whole matrices; None: the CPU.
        """
        self.checkpoint, self.settings, self.card = checkpoint, settings, card
        self.products: Products = HOST if card is None else card
        self.runner = LayerRunner(checkpoint, [len(window) for window in windows])
        self._reference = self.runner.embed(np.concatenate(list(windows)))
        self._quantized = self._reference.copy()

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on after a layer whose state this is."""
        self._reference, self._quantized = state["reference"], state["quantized"]

    def encode_layer(self, layer: int, linears: Sequence[Linear]) -> LayerResult:
        """Encode all linears of decoder layer `layer`; `state` is what `restore` takes.

        Raises CheckpointError of the model's numbers, with the tensor's name or the layer's.
        """
        work = _LayerWork(self, layer, linears)
        started = time.perf_counter()
        try:
            work.run()
        except CheckpointError:
            raise
        except ValueError as error:  # what no single tensor is to blame for: products overflow
            raise CheckpointError(f"{self.checkpoint.source}: layer {layer}: {error}") from error
        work.figures["seconds"] = round(time.perf_counter() - started, 2)
        state = {"reference": self._reference, "quantized": self._quantized}
        return LayerResult(work.tensors, state, work.figures)

    def advance(self, reference: ArrayF32, quantized: ArrayF32) -> float:
        """Move both streams behind a layer; relative squared distance of the two."""
        self._reference, self._quantized = reference, quantized
        apart = np.square(reference - quantized, dtype=np.float64).sum()
        return float(apart / max(np.square(reference, dtype=np.float64).sum(), 1e-30))

    def input_moments(self, layer: int) -> InputMoments:
        """Moments of what enters the linears that all tokens pass, in the quantised stream."""
        found = InputMoments(self.products)
        self.runner.enter_mlp(layer, self._quantized, {}, found.see)
        return found

    def enter(self, layer: int, made: Made) -> tuple[MlpInput, MlpInput]:
        """Run both streams up to the layer's experts: bf16, quantised."""
        return (
            self.runner.enter_mlp(layer, self._reference, {}),
            self.runner.enter_mlp(layer, self._quantized, made),
        )


class _LayerWork:
    """One layer: what was made of it, and the figures of the report."""

    def __init__(self, owner: CalibratedEncoder, layer: int, linears: Sequence[Linear]) -> None:
        self.owner, self.layer = owner, layer
        self.always = [linear for linear in linears if linear.expert is None]
        self.experts = {
            (linear.role, linear.expert): linear for linear in linears if linear.expert is not None
        }
        self.tensors: dict[str, Any] = {}
        self.figures: dict[str, Any] = {"layer": layer, "kinds": {}, "experts": []}
        self._packed: dict[tuple[str, int], dict[str, FileTensor]] = {}
        # By linear: with a card several are under way at once, and sums want an order.
        self._losses: dict[tuple[str, int], list[Any]] = {}
        self._sums: dict[str, tuple[WeightKind, int, int, float, float]] = {}

    def run(self) -> None:
        made: dict[str, Any] = {}
        data_free = self.owner.settings.method == "data-free"
        moments = None if data_free else self.owner.input_moments(self.layer)
        for linear in self.always:
            own = None if moments is None else moments.take(linear.role)
            matrix = self._encoded(linear, self._read(linear), own)
            made[linear.module] = linear.kind, for_loading(matrix.tensors)
            self._keep(linear, matrix)
        reference, quantized = self.owner.enter(self.layer, made)
        before, after = reference.residual + reference.dense, quantized.residual + quantized.dense
        if self.experts:
            self._run_experts(reference, quantized, before, after)
        self._add_up()
        self.figures["stream_error"] = self.owner.advance(before, after)

    def _run_experts(
        self, reference: MlpInput, quantized: MlpInput, before: ArrayF32, after: ArrayF32
    ) -> None:
        """Encode the experts; `before` and `after` become the streams behind the layer."""
        products = self.owner.products
        count = self.owner.checkpoint.config.moe_num_experts
        routed = group_by_expert(quantized.experts, quantized.weights, count)
        self.figures["tokens"] = [len(tokens) for tokens in routed]
        plain = group_by_expert(reference.experts, reference.weights, count)
        add_outputs(before, reference.x, plain, self._read_expert, products)
        if self.owner.settings.method == "corrected":
            target = before - after
        else:  # each expert by itself: what the bf16 experts give on the same input
            target = np.zeros_like(after)
            add_outputs(target, quantized.x, routed, self._read_expert, products)
        self._encode(reference, quantized, target, routed)
        add_outputs(after, quantized.x, routed, self._decode_expert, products)

    def _encode(
        self, reference: MlpInput, quantized: MlpInput, target: ArrayF32, routed: list[Routed]
    ) -> None:
        wanted = float(np.square(target, dtype=np.float64).sum())
        LayerEncoding(
            quantized.x,
            reference.x,
            target,
            routed,
            self._read_expert,
            self._encode_expert,
            self.owner.settings.method == "corrected",
            self.owner.products,
        ).run()
        left = float(np.square(target, dtype=np.float64).sum())
        self.figures["output_error"] = left / max(wanted, 1e-30)

    def _encoded(self, linear: Linear, weight: ArrayF32, moments: ArrayF32 | None) -> EncodedMatrix:
        try:
            return encode_matrix(linear.kind, weight, moments, self.owner.settings, self.owner.card)
        except ValueError as error:
            source = self.owner.checkpoint.source
            raise CheckpointError(f"{source}: {linear.module}: {error}") from error

    def _read(self, linear: Linear) -> ArrayF32:
        return read_dense(self.owner.checkpoint, linear)

    def _read_expert(self, name: str, expert: int) -> ArrayF32:
        return self._read(self.experts[name, expert])  # type: ignore[index]

    def _encode_expert(
        self, name: str, expert: int, weight: ArrayF32, moments: ArrayF32
    ) -> ArrayF32:
        linear = self.experts[name, expert]  # type: ignore[index]
        matrix = self._encoded(linear, weight, moments)
        rounded = round_to_nearest(weight, linear.kind)
        energy, after, before = self.owner.products.losses(
            [weight, weight - matrix.decoded, weight - rounded], moments
        )
        energy = max(energy, 1e-30)
        self._losses[name, expert] = [name, expert, after / energy, before / energy]
        self._keep(linear, matrix)
        self._packed[name, expert] = matrix.tensors
        return matrix.decoded

    def _decode_expert(self, name: str, expert: int) -> ArrayF32:
        """An expert anew from its packed form: a layer's in float32 may be 16 times the files."""
        kind = self.experts[name, expert].kind  # type: ignore[index]
        matrix = formats.get(kind).decode(for_loading(self._packed[name, expert]))
        order = self.owner.settings.row_order
        return to_true_order(matrix, order) if kind == "ccq" else matrix

    def _keep(self, linear: Linear, matrix: EncodedMatrix) -> None:
        for suffix, tensor in matrix.tensors.items():
            self.tensors[f"{linear.module}.{suffix}"] = tensor
        original = self._read(linear)
        self._sums[linear.module] = (
            linear.kind,
            original.size,
            8 * sum(array.nbytes for array, _ in matrix.tensors.values()),
            float(np.square(original, dtype=np.float64).sum()),
            float(np.square(matrix.decoded - original, dtype=np.float64).sum()),
        )

    def _add_up(self) -> None:
        """Put the figures of all linears into the report, gate and up first."""
        order = sorted(self.experts, key=lambda key: (key[0] != UP, key))
        self.figures["experts"] = [self._losses[key] for key in order if key in self._losses]
        always = [linear.module for linear in self.always]
        chosen = [self.experts[key].module for key in order]
        for module in (*always, *chosen):
            name, *sums = self._sums[module]
            total = self.figures["kinds"].setdefault(name, [0, 0, 0.0, 0.0])
            total[:] = [one + other for one, other in zip(total, sums, strict=True)]


def encode_matrix(
    kind: WeightKind,
    weight: ArrayF32,
    moments: ArrayF32 | None,
    settings: CalibrationSettings,
    card: Card | None = None,
) -> EncodedMatrix:
    """Encode one matrix [K, N] as `settings.method` says.

    Args:
        kind: ccq, int4 or int8.
        weight: in true row order.
        moments: [K, K] of its inputs; None encodes without them.
        settings: the method, and the row order of ccq.
        card: searches the codes of ccq; None: the CPU.

    Raises:
        ValueError: a value is not finite, or the format cannot hold the sizes.
    """
    if settings.method == "diagonal" and moments is not None:
        moments = np.diag(np.diagonal(moments))
    if settings.method == "data-free":
        moments = None
    if kind == "ccq":
        encoded = _encode_ccq(weight, moments, settings, card)
        return EncodedMatrix(
            ccq_tensors(encoded), to_true_order(encoded.decode(), settings.row_order)
        )
    if moments is not None:
        result = int_hessian.quantize(weight, moments, _LARGEST[kind])
    else:
        result = (quantize_int8 if kind == "int8" else quantize_int4)(weight)
    return EncodedMatrix(_int_tensors(kind, result), result.dequantize())


_LARGEST: dict[WeightKind, int] = {"int8": 127, "int4": 7}


def _encode_ccq(
    weight: ArrayF32,
    moments: ArrayF32 | None,
    settings: CalibrationSettings,
    card: Card | None,
) -> CCQWeight:
    order = settings.row_order
    if card is not None:
        if moments is None:
            return card.encode(weight, row_order=order).weight
        return card.encode_hessian(
            weight,
            moments,
            candidates=settings.candidates,
            descents=settings.descents,
            row_order=order,
        ).weight
    stored = to_stored_order(weight, order)
    if moments is None:
        return ccq_search.encode(stored)
    moved = to_stored_order(to_stored_order(moments, order).T, order)
    return ccq_hessian.encode(
        stored,
        np.ascontiguousarray(moved),
        candidates=settings.candidates,
        descents=settings.descents,
    )


def for_loading(tensors: dict[str, FileTensor]) -> dict[str, Any]:
    """Arrays as `read_linear` gives them of a file with these tensors."""
    return {
        suffix: bfloat16_to_float32(array) if dtype == "BF16" else array
        for suffix, (array, dtype) in tensors.items()
    }


def _int_tensors(kind: WeightKind, result: IntWeight) -> dict[str, FileTensor]:
    pack = pack_int8 if kind == "int8" else pack_int4
    return {
        "quant_weight": (pack(result.quantized), "I8"),
        "weight_scale": (float32_to_bfloat16(result.scale), "BF16"),
    }


def read_dense(checkpoint: Checkpoint, linear: Linear) -> ArrayF32:
    """The bf16 weight of a linear as float32 [K, N], whatever the order of axes in the file."""
    source = np.ascontiguousarray(
        read_linear(checkpoint, replace(linear, kind="dense")).arrays["weight"]
    )
    return bfloat16_to_float32(source) if source.dtype == np.uint16 else source
