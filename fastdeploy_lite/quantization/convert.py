"""A bf16 ERNIE-4.5 MoE checkpoint in, the published 2Bits-Paddle form out.

The routed experts become int4 up to a layer and CCQ after it, every other linear int8; embedding,
norms, router and head stay as they are. One linear is in memory at a time, beside the packed form
of its layer: it is read from the mapped file and quantised on all cores (threads over column
blocks); the layer goes to the journal and is appended to the output.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.checkpoint import Checkpoint, CheckpointWriter
from fastdeploy_lite.checkpoint.inventory import (
    check_dense_values,
    check_plain_values,
    expected_linear_tensors,
    expected_plain_tensors,
    read_embedding,
    read_linear,
    read_lm_head,
    verify,
)
from fastdeploy_lite.checkpoint.linears import (
    Linear,
    check_sizes,
    check_tensor_parallel,
    model_linears,
)
from fastdeploy_lite.checkpoint.progress import loading_bar
from fastdeploy_lite.checkpoint.writer import write_json
from fastdeploy_lite.formats.ccq import (
    ROW_ORDERS,
    CCQWeight,
    RowOrder,
    to_stored_order,
    to_true_order,
)
from fastdeploy_lite.formats.tiles import pack_int4, pack_int8
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization import ccq_search
from fastdeploy_lite.quantization.card import Card
from fastdeploy_lite.quantization.figures import (
    ConversionReport,
    KindReport,
    LinearFigures,
    bits_per_weight,
)
from fastdeploy_lite.quantization.journal import FileTensor, Journal, LayerResult
from fastdeploy_lite.quantization.nearest import two_bit_error
from fastdeploy_lite.quantization.output_folder import (
    check_output,
    copy_companions,
    prepare_output,
    unfinished_folder,
)
from fastdeploy_lite.quantization.report import NOT_MEASURED, memory, totals
from fastdeploy_lite.quantization.report import write as write_report
from fastdeploy_lite.quantization.weight_only import quantize_int4, quantize_int8
from fastdeploy_lite.quantization_config import QuantizationConfig, WeightKind
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

Scheme = Literal["w4w2", "2bits", "wint4", "wint8"]
DenseType = Literal["wint8", "wint4"]
Codes = Sequence[tuple[float, float]]

DEFAULT_W4_END_LAYER = 6
"""Last layer with int4 experts in the published 300B model (inclusive)."""
_VALUES_IN_DIGEST = 256


def quantize_checkpoint(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    scheme: Scheme = "w4w2",
    w4_end_layer: int | None = None,
    w4_layers: Sequence[int] | None = None,
    dense: DenseType = "wint8",
    codes: Codes | None = None,
    row_order: RowOrder = "permuted",
    tensor_parallel_size: int = 1,
    shard_bytes: int = 4 << 30,
    force: bool = False,
    workers: int | None = None,
    card: Card | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Quantise the bf16 checkpoint in ``model_dir`` into the new folder ``output_dir``.

    scheme: "w4w2" has int4 experts in decoder layers 0..``w4_end_layer`` (inclusive) and CCQ
    experts after; "2bits" CCQ experts in every MoE layer; "wint4" int4 experts in every layer;
    "wint8" int8 ones. All but "wint8" are written as the published ``quantization_config``.
    w4_end_layer: default 6 as published, or the first MoE layer of a model with at most 7 layers;
    for "w4w2" alone.
    w4_layers: the int4 layers one by one, in place of w4_end_layer; only this project reads them.
    dense: "wint4" halves the bytes of attention, dense MLP and shared experts, which every token
    reads; published models have "wint8".
    codes: see ``ccq.encode``.
    row_order: of the rows of CCQ experts inside every 64; "permuted" is what FastDeploy 2.1 and
    later read, "natural" what its first release does. It is noted in config.json.
    tensor_parallel_size: above 1, folders ``rank0/`` ... are written, each quantised from its own
    part of the matrices, as the published TP models are.
    shard_bytes: size of an output file. force: replace an output folder that is not empty.
    workers: threads of the encoder (default: all CPUs).
    card: searches the codes of CCQ experts (`card.find`); None: the CPU.

    The result depends on the input alone, not on threads, memory or card. Layers of 2-bit experts
    are kept in the folder `output_dir` + `.unfinished` until all is done: a run that was killed
    goes on after them when it is started again with the same arguments, on whatever device, and
    ends with the same bytes.

    Raises ConfigError (arguments, an input that is quantised already, other arguments than the
    unfinished run) and CheckpointError (damaged input, a linear whose sizes the format cannot hold,
    an output folder in use); a failed run leaves no model.
    """
    started = time.perf_counter()
    ranks = _open_ranks(model_dir, tensor_parallel_size)
    config = target_config(ranks[0].config, scheme, w4_end_layer, row_order, w4_layers, dense)
    _check_input(ranks, config)
    if card is None and _searches_codes(config):
        check_dense_values(ranks[0])  # before hours; a card or rounding finds it in minutes
    model, output = Path(model_dir), Path(output_dir)
    check_output(model, output, force)
    report = ConversionReport()
    settings = _settings(config, codes, tensor_parallel_size)
    journal = _journal(output, ranks[0], config, settings)
    works = [_Encoding(rank, codes, workers, row_order, report, journal, card) for rank in ranks]
    prepare_output(model, output, force)  # removes a model: last, when nothing refuses
    try:
        _write(output, works, config, shard_bytes, progress)
    except CheckpointError:  # of the input, which will be another one next time
        if journal is not None:
            journal.remove()
        raise
    report.seconds = time.perf_counter() - started
    if card is not None:
        settings["device"] = "nvidia"
    write_report(output, _content(report, settings, config, works[0]))
    _finish(model, output, config, len(ranks), journal)
    return report


def _open_ranks(model_dir: str | Path, count: int) -> list[Checkpoint]:
    """The input as each rank reads it."""
    if count < 1:
        raise ConfigError(f"tensor_parallel_size: found {count}, expected 1 or more")
    return [Checkpoint.open(model_dir, count, rank) for rank in range(count)]


def _check_input(ranks: Sequence[Checkpoint], config: ModelConfig) -> None:
    """Refuse damaged input, and sizes that `config`'s formats or so many ranks cannot hold."""
    verify(ranks[0])
    if len(ranks) > 1:
        check_tensor_parallel(config, len(ranks), for_files=True)
    check_sizes(model_linears(config), config.source)
    check_plain_values(ranks[0])


def _content(
    report: ConversionReport, settings: Mapping[str, Any], config: ModelConfig, first: _Encoding
) -> dict[str, Any]:
    """What report.json holds; `first` is one rank's work, which is like that of the others."""
    return {
        "seconds": round(report.seconds, 1),
        "resumed_layers": report.resumed_layers,
        "input_bytes": report.input_bytes,
        "output_bytes": report.output_bytes,
        "settings": dict(settings),
        "layers": report.layers,
        "formats": totals(report.layers),
        "bits_per_weight": bits_per_weight(report.kinds),
        "memory": memory(config, first.plain_bytes, first.checkpoint.tensor_parallel_size),
        "not_measured": NOT_MEASURED,
    }


def _finish(
    model: Path, output: Path, config: ModelConfig, ranks: int, journal: Journal | None
) -> None:
    """Complete an output folder whose weights are written."""
    copy_companions(model, output)
    if ranks > 1:  # last: a folder without it is not taken for a model
        write_json(output / "config.json", dict(config.raw))
    if journal is not None:
        journal.remove()


def _write(
    output: Path, works: Sequence[_Encoding], config: ModelConfig, shard_bytes: int, progress: bool
) -> None:
    """Encode and write all ranks, each into a folder of its own where there are several."""
    report = works[0].report
    with ExitStack() as stack:
        nbytes = works[0].checkpoint.nbytes
        bar = stack.enter_context(loading_bar(nbytes, progress, "Quantizing Weights"))
        folders = [output] if len(works) == 1 else [output / f"rank{i}" for i in range(len(works))]
        for work, folder in zip(works, folders, strict=True):
            own_config = dict(config.raw) if folder == output else None
            writer = stack.enter_context(CheckpointWriter(folder, own_config, shard_bytes))
            plain = {expected.key for expected in expected_plain_tensors(work.checkpoint)}
            for item in plan(work.checkpoint, config):
                if isinstance(item, str):
                    tensors, size = _copied(work.checkpoint, item)
                    work.plain_bytes += size if item in plain else 0
                else:
                    tensors, size = work.layer(item)
                for key, (array, dtype) in tensors.items():
                    writer.add(key, array, dtype)
                    report.output_bytes += array.nbytes
                report.input_bytes += size
                bar.update(size)
                work.checkpoint.release()


def _searches_codes(config: ModelConfig) -> bool:
    """Whether there are 2-bit experts, which take long."""
    return any(linear.kind == "ccq" for linear in model_linears(config))


def _settings(config: ModelConfig, codes: Codes | None, ranks: int) -> dict[str, Any]:
    """What the result depends on, beside the input."""
    return {
        "codes": None if codes is None else [list(map(float, code)) for code in codes],
        "tensor_parallel_size": ranks,
        "quantization_config": config.raw["quantization_config"],
    }


def _journal(
    output: Path, checkpoint: Checkpoint, config: ModelConfig, settings: Mapping[str, Any]
) -> Journal | None:
    """Of the layers whose search takes long; None where there is none."""
    if not _searches_codes(config):
        return None
    return Journal(unfinished_folder(output), {"model": model_digest(checkpoint), **settings})


def model_digest(checkpoint: Checkpoint) -> str:
    """Of a model's keys, shapes and the first values of every tensor: all are too many to read."""
    digest = hashlib.sha256()
    for key in sorted(checkpoint):
        tensor = checkpoint.get(key)
        digest.update(f"{key} {tensor.dtype} {list(tensor.data.shape)}".encode())
        digest.update(np.asarray(tensor.data.flat[:_VALUES_IN_DIGEST]).tobytes())
    checkpoint.release()
    return digest.hexdigest()


def _copied(checkpoint: Checkpoint, key: str) -> tuple[dict[str, FileTensor], int]:
    """What an output file holds of a tensor that stays as it is, and its bytes."""
    source, family = checkpoint.get(key), checkpoint.config.family
    data = source.data  # the writer straightens a transposed view
    if key == family.embedding_key:
        data = read_embedding(checkpoint)
    elif key == family.head_key and (found := read_lm_head(checkpoint)) is not None:
        data = found[0]
    return {key: (data, source.dtype)}, data.nbytes


def quantize_matrix(
    kind: WeightKind,
    weight: npt.NDArray[np.float32],
    *,
    codes: Codes | None = None,
    workers: int | None = None,
    row_order: RowOrder = "natural",
) -> tuple[dict[str, FileTensor], npt.NDArray[np.float32]]:
    """One matrix [K, N] as the tensors of a file (suffix -> bits, dtype), and what they decode to.

    kind is int8, int4 or ccq. The suffixes are those of docs/checkpoint_format.md.
    """
    if kind == "ccq":
        stored = to_stored_order(weight, row_order)
        encoded = ccq_search.encode(stored, codes=codes, workers=workers)
        return ccq_tensors(encoded), to_true_order(encoded.decode(), row_order)
    quantize, pack = (quantize_int8, pack_int8) if kind == "int8" else (quantize_int4, pack_int4)
    result = quantize(weight)
    tensors: dict[str, FileTensor] = {
        "quant_weight": (pack(result.quantized), "I8"),
        "weight_scale": (float32_to_bfloat16(result.scale), "BF16"),
    }
    return tensors, result.dequantize()


def ccq_tensors(encoded: CCQWeight) -> dict[str, FileTensor]:
    """What a file holds of an encoded matrix, by suffix."""
    return {
        "quant_weight": (encoded.packed, "U8"),
        "weight_scale": (encoded.local_scale, "U8"),
        "super_scales": (float32_to_bfloat16(encoded.super_scale), "BF16"),
        "code_scale": (encoded.code_scale, "F32"),
        "code_zp": (encoded.code_zp, "F32"),
    }


def target_config(
    source: ModelConfig,
    scheme: str,
    w4_end_layer: int | None,
    row_order: RowOrder,
    w4_layers: Sequence[int] | None = None,
    dense: DenseType = "wint8",
) -> ModelConfig:
    """The output's configuration: the input's keys, `is_quantized` and `quantization_config`."""
    if dense not in get_args(DenseType):
        raise ConfigError(f"dense: found {dense!r}, expected {' or '.join(get_args(DenseType))}")
    if row_order not in ROW_ORDERS:
        raise ConfigError(f"row_order: found {row_order!r}, expected natural or permuted")
    if source.quantization is not None:
        raise ConfigError(
            f"{source.source}: quantization_config: found "
            f"{source.quantization.quantization!r}, expected an unquantised bf16 checkpoint"
        )
    if not source.moe_num_experts:
        raise ConfigError(f"{source.source}: moe_num_experts: found none, expected a MoE model")
    last = source.num_hidden_layers - 1
    chosen: tuple[int, ...] | None = None
    if w4_layers is None:
        end = _w4_end_layer(source, scheme, w4_end_layer)
    else:
        chosen = _w4_layers(source, scheme, w4_end_layer, w4_layers)
        end = _leading(source, chosen)
        if not chosen or chosen[-1] <= end:
            chosen = None  # the published range says it, and everybody reads that
    if scheme == "wint8":
        quantization = replace(QuantizationConfig.online("wint8"), dense_quant_type=dense)
    else:
        quantization = QuantizationConfig(
            dense_quant_type=dense,
            w4_start_layer=0,
            w4_end_layer=end,
            w2_start_layer=end + 1,
            w2_end_layer=last,
            row_order=row_order if end < last else None,
            w4_layers=chosen,
        )
    raw: dict[str, Any] = {
        **source.family.convert_config(source),
        "is_quantized": True,
        "quantization_config": quantization.to_dict(),
    }
    return ModelConfig.from_dict(raw, source.source)


def _w4_end_layer(source: ModelConfig, scheme: str, requested: int | None) -> int:
    if scheme not in get_args(Scheme):
        raise ConfigError(
            f"scheme: found {scheme!r}, expected one of {', '.join(get_args(Scheme))}"
        )
    first, last = source.moe_layer_start_index, source.num_hidden_layers - 1
    if scheme == "w4w2":
        # The published rule would leave a short model no 2-bit layer: there, one MoE layer is int4.
        default = DEFAULT_W4_END_LAYER if last > DEFAULT_W4_END_LAYER else first
        end = default if requested is None else requested
        if not -1 <= end <= last:
            raise ConfigError(
                f"moe_w4_end_layer: found {end}, expected -1 (no int4 experts) to {last}, the last "
                "decoder layer of this model"
            )
        return end
    if requested is not None:
        raise ConfigError(f"moe_w4_end_layer: scheme {scheme!r} fixes it; use scheme 'w4w2'")
    # Dense layers have no experts, so "2bits" may end int4 just before the first MoE layer.
    return last if scheme == "wint4" else first - 1


def _w4_layers(
    source: ModelConfig, scheme: str, end: int | None, layers: Sequence[int]
) -> tuple[int, ...]:
    """The int4 layers in order."""
    if scheme != "w4w2" or end is not None:
        raise ConfigError("int4 layers one by one: expected scheme 'w4w2' and no moe_w4_end_layer")
    moe = [i for i in range(source.num_hidden_layers) if source.is_moe_layer(i)]
    if wrong := sorted(set(layers) - set(moe)):
        raise ConfigError(
            f"int4 layers: found {wrong[0]}, expected MoE layers, {moe[0]} to {moe[-1]}"
        )
    return tuple(sorted(set(layers)))


def _leading(source: ModelConfig, chosen: Sequence[int]) -> int:
    """Last layer before the first MoE layer that is not chosen."""
    end = source.moe_layer_start_index - 1
    while end + 1 in chosen:
        end += 1
    return end


def plan(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[str | list[Linear]]:
    """What goes into the output, in the order in which a loader wants it: layer by layer.

    Keys are copied, the linears of a layer quantised. Tensors that the model does not use (draft
    layers, expert statistics) are copied too; layers that `remove_tail_layer` drops are left out.
    """
    by_layer: dict[int, list[Linear]] = {}
    consumed: set[str] = set()
    size, rank = checkpoint.tensor_parallel_size, checkpoint.rank
    sources = model_linears(checkpoint.config)
    for target, source in zip(model_linears(config, size, rank), sources, strict=True):
        by_layer.setdefault(target.layer, []).append(target)
        consumed.update(e.key for e in expected_linear_tensors(checkpoint, source, "dense"))
    copied: dict[int, list[str]] = {}
    for key in sorted(checkpoint):  # the order of files must not show in the output
        if key not in consumed:
            layer = checkpoint.config.family.layer_of(key)
            copied.setdefault(-1 if layer is None else layer, []).append(key)
    for layer in (-1, *range(config.num_hidden_layers)):
        yield from copied.get(layer, ())
        if layer in by_layer:
            yield by_layer[layer]


@dataclass
class _Encoding:
    """Linears of one rank of the input: how they are encoded, and what was found."""

    checkpoint: Checkpoint
    codes: Codes | None
    workers: int | None
    row_order: RowOrder
    report: ConversionReport
    journal: Journal | None
    card: Card | None
    plain_bytes: int = 0
    """Of embedding, head, norms and routers, as this rank keeps them."""

    def layer(self, linears: Sequence[Linear]) -> tuple[dict[str, FileTensor], int]:
        """Tensors by full key for the linears of a layer, and the bytes that were read for them.

        Layers of 2-bit experts come from the journal or go there. Rounding to int4 or int8 takes
        no longer than reading what was rounded before.
        """
        layer = linears[0].layer
        number = layer * self.checkpoint.tensor_parallel_size + self.checkpoint.rank
        keep = self.journal if any(linear.kind == "ccq" for linear in linears) else None
        found = None if keep is None else keep.load(number)
        if found is None or "linears" not in found.figures:  # kept by a version without a report
            found = self._encode(linears)
            if keep is not None:
                keep.save(number, found)
        else:
            self.report.resumed_layers += 1
        self.report.count(layer, map(LinearFigures.of_row, found.figures["linears"]))
        return found.tensors, found.figures["input_bytes"]

    def _encode(self, linears: Sequence[Linear]) -> LayerResult:
        result = LayerResult({}, figures={"input_bytes": 0, "linears": []})
        for linear in linears:
            tensors, size, figures = self._linear(linear)
            result.tensors.update(tensors)
            result.figures["input_bytes"] += size
            result.figures["linears"].append(figures.row())
            self.checkpoint.release()
        return result

    def _linear(self, linear: Linear) -> tuple[dict[str, FileTensor], int, LinearFigures]:
        """Tensors by full key, the bytes that were read for them, and what was found."""
        source = read_linear(self.checkpoint, _as_dense(linear)).arrays["weight"]
        # In one order of memory whatever the file's: sums of another order differ in the last bit.
        source = np.ascontiguousarray(source)
        try:
            tensors, energy, error = self._quantized(linear.kind, source)
        except ValueError as error_found:
            raise CheckpointError(
                f"{self.checkpoint.source}: {linear.module}: {error_found}"
            ) from error_found
        bits = 8 * sum(array.nbytes for array, _ in tensors.values())
        rounding = two_bit_error(source) * energy if linear.kind == "ccq" else error
        name = linear.module.partition(f".{linear.layer}.")[2]
        figures = LinearFigures(
            name if linear.expert is None else linear.role,
            linear.expert,
            linear.kind,
            KindReport(source.size, bits, energy, error, rounding),
        )
        named = {f"{linear.module}.{suffix}": tensor for suffix, tensor in tensors.items()}
        return named, source.nbytes, figures

    def _quantized(
        self, kind: WeightKind, source: npt.NDArray[Any]
    ) -> tuple[dict[str, FileTensor], float, float]:
        """Tensors by suffix, and the sums of squares of weights and errors."""
        is_bfloat16 = source.dtype == np.uint16
        if kind == "ccq" and self.card is not None:
            given = source if is_bfloat16 else source.astype(np.float32, copy=False)
            found = self.card.encode(given, codes=self.codes, row_order=self.row_order)
            return ccq_tensors(found.weight), found.energy, found.error
        weight = bfloat16_to_float32(source) if is_bfloat16 else source
        tensors, decoded = quantize_matrix(
            kind, weight, codes=self.codes, workers=self.workers, row_order=self.row_order
        )
        energy = float(np.square(weight, dtype=np.float64).sum())
        return tensors, energy, float(np.square(decoded - weight, dtype=np.float64).sum())


def _as_dense(linear: Linear) -> Linear:
    """The same linear as the unquantised input has it."""
    return replace(linear, kind="dense")
