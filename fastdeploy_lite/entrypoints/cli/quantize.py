"""`fastdeploy-lite quantize`: a bf16 checkpoint in, a 2-bit one out."""

from __future__ import annotations

import argparse
import math
import re
import sys
from typing import get_args

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.checkpoint.hub import resolve_model
from fastdeploy_lite.entrypoints.cli.argument_types import not_negative, positive, seconds
from fastdeploy_lite.formats.ccq import ROW_ORDERS
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization import card
from fastdeploy_lite.quantization.budget import w4_end_layer_for_bits
from fastdeploy_lite.quantization.convert import (
    DEFAULT_W4_END_LAYER,
    DenseType,
    Scheme,
    quantize_checkpoint,
)
from fastdeploy_lite.quantization.figures import ConversionReport
from fastdeploy_lite.utils import blas
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_CALIBRATION_DEFAULTS = {
    "calibration_tokens": 65536, "calibration_method": "hessian", "keep_every": 300.0, "seed": 0,
}  # fmt: skip
MEASURED = "measured"
_SMALLEST_SHARD = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.description = (
        "Quantise a bf16 ERNIE-4.5 MoE checkpoint (Paddle or Hugging Face names) to the published "
        "2Bits-Paddle form: int4 and 2-bit experts, int8 for the other linears."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="folder of the bf16 model, or repository id"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    _add_formats(parser)
    _add_files(parser)
    _add_calibration(parser.add_argument_group("calibration"))
    _add_process(parser)


def _add_formats(parser: argparse.ArgumentParser) -> None:
    """What the linears become."""
    parser.add_argument(
        "--scheme",
        choices=get_args(Scheme),
        default="w4w2",
        help="w4w2: int4 experts in the first layers, 2-bit after (default); 2bits: 2-bit experts "
        "in all MoE layers; wint4: int4 experts in all layers; wint8: int8 experts",
    )
    parser.add_argument(
        "--dense",
        choices=get_args(DenseType),
        default="wint8",
        help="attention, dense MLP and shared experts: wint8 as published (default), or wint4 for "
        "half the bytes of what every token reads",
    )
    parser.add_argument(
        "--moe-w4-end-layer",
        type=int,
        metavar="N",
        help="last decoder layer (0-based, inclusive) with int4 experts under w4w2 "
        f"(default {DEFAULT_W4_END_LAYER}, in short models the first MoE layer; -1 for none)",
    )
    parser.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="w4w2 with as many int4 layers from the first as keep the routed experts at B bits a "
        "weight or below, scales included; in place of --moe-w4-end-layer",
    )
    parser.add_argument(
        "--int4-layers",
        metavar="LAYERS",
        help="w4w2 with int4 experts in any layers: numbers such as 1,4,5, or `measured`: those "
        "that gain most on the --calibration text within --bits. Only this package reads a choice "
        "that is no range from the first layer",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    """How that is laid out in files."""
    parser.add_argument(
        "--shard-size",
        type=parse_size,
        default=4 << 30,
        metavar="SIZE",
        help="largest output file, such as 500M or 4G (default 4G)",
    )
    parser.add_argument(
        "--code",
        type=parse_code,
        metavar="SCALE,ZP",
        help="one fixed code_scale and code_zp for all columns instead of the search",
    )
    parser.add_argument(
        "--row-order",
        choices=ROW_ORDERS,
        default="permuted",
        help="rows of 2-bit experts: permuted, as FastDeploy 2.1 and later read them (default), "
        "or natural, as its first release does",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="write folders rank0 ... for N ranks, each part quantised on its own (default 1)",
    )


def _add_calibration(text: argparse._ArgumentGroup) -> None:
    """What the encoder may know of activations."""
    text.add_argument(
        "--calibration",
        metavar="FILE",
        help="text (.txt, .jsonl, .parquet) on whose activations weights are encoded: half the "
        "loss, some ten times the time; `sample` is a packaged text",
    )
    text.add_argument(
        "--calibration-tokens",
        type=positive,
        metavar="N",
        help="tokens of it that are used, drawn at random (default 65536)",
    )
    text.add_argument(
        "--calibration-method",
        choices=("data-free", "diagonal", "hessian", "corrected"),
        help="what the encoder knows: nothing; the size of each input; their correlations "
        "(default); these and the errors of what lies before",
    )
    text.add_argument(
        "--tune",
        type=positive,
        nargs="?",
        const=2,
        metavar="EPOCHS",
        help="then let all scales and norms learn from the bf16 model on the same text (default 2 "
        "passes over it)",
    )
    text.add_argument(
        "--keep-every",
        type=seconds,
        metavar="SECONDS",
        help="work, in whole layers, that a killed run may lose (default 300); 0: write what a "
        "restart needs after every layer",
    )
    text.add_argument("--seed", type=not_negative, help="of the draw of text (default 0)")


def _add_process(parser: argparse.ArgumentParser) -> None:
    """Where it runs, and what it says."""
    parser.add_argument(
        "--device",
        choices=card.CHOICES,
        default="auto",
        help="where 2-bit codes are searched: nvidia, cpu, or auto: a card where there is one "
        "(default)",
    )
    parser.add_argument("--num-threads", type=positive, metavar="N", help="default: all CPUs")
    parser.add_argument("--force", action="store_true", help="replace a model in --output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Convert; 0, or 1 with a line on stderr that names what is wrong."""
    try:
        _check_layers(args)
        _check_calibration(args)
        args.model = resolve_model(args.model)
        if args.bits is not None and args.int4_layers is None:
            args.moe_w4_end_layer = _layers_for_bits(args)
        args.card = _card(args)
        text = _convert(args) if args.calibration is None else _calibrate(args)
    except (FastDeployError, OSError) as error:
        print(f"fastdeploy-lite quantize: {error}", file=sys.stderr)
        return 1
    if not args.quiet:
        print(text)
    return 0


def _card(args: argparse.Namespace) -> card.Card | None:
    """Where codes are searched, with a line that says so; rounding searches none."""
    if args.scheme in ("wint4", "wint8") and args.calibration is None:
        return None
    found, reason = card.find(args.device)
    if not args.quiet:
        print(f"2-bit codes are searched on {'an NVIDIA card' if found else 'the CPU'}: {reason}")
    return found


def _check_calibration(args: argparse.Namespace) -> None:
    """Refuse options of calibration where there is none; fill in the rest."""
    if args.calibration is None and args.tune is not None:
        raise ConfigError("--tune needs --calibration: it learns from that text")
    for name, default in _CALIBRATION_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.calibration is None:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --calibration")


def _check_layers(args: argparse.Namespace) -> None:
    """Refuse options on int4 layers that do not go together; numbers become a list."""
    if args.int4_layers is None:
        return
    if args.scheme != "w4w2" or args.moe_w4_end_layer is not None:
        raise ConfigError(
            "--int4-layers chooses layers under --scheme w4w2: leave out --moe-w4-end-layer"
        )
    if args.int4_layers == MEASURED:
        if args.bits is None or args.calibration is None:
            raise ConfigError(
                "--int4-layers measured needs --calibration, the text to measure on, and --bits, "
                "the size to keep to"
            )
        return
    if args.bits is not None:
        raise ConfigError("--int4-layers names the layers that --bits would choose: pass one")
    parts = args.int4_layers.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(
            f"--int4-layers: found {args.int4_layers!r}, expected numbers such as 1,4,5, or "
            f"{MEASURED}"
        )
    args.int4_layers = [int(part) for part in parts]


def _layers_for_bits(args: argparse.Namespace) -> int:
    if args.scheme != "w4w2" or args.moe_w4_end_layer is not None:
        raise ConfigError("--bits chooses --moe-w4-end-layer under --scheme w4w2: pass it alone")
    config = ModelConfig.from_dir(args.model)
    return w4_end_layer_for_bits(config, args.bits)


def _convert(args: argparse.Namespace) -> str:
    report = quantize_checkpoint(
        args.model,
        args.output,
        scheme=args.scheme,
        w4_end_layer=args.moe_w4_end_layer,
        w4_layers=args.int4_layers,
        dense=args.dense,
        codes=None if args.code is None else [args.code],
        row_order=args.row_order,
        tensor_parallel_size=args.tensor_parallel_size,
        shard_bytes=args.shard_size,
        force=args.force,
        workers=args.num_threads,
        card=args.card,
        progress=not args.quiet,
    )
    return summary(report)


def _calibrate(args: argparse.Namespace) -> str:
    if args.code is not None:
        raise ConfigError("--code fixes what --calibration chooses: pass one of them")
    if args.tensor_parallel_size != 1:
        raise ConfigError(
            "--calibration writes whole matrices, which any number of ranks can load: leave out "
            "--tensor-parallel-size"
        )
    # Here because it needs the engine, and Paddle, which the data-free way does without.
    from fastdeploy_lite.calibration import convert  # noqa: PLC0415
    from fastdeploy_lite.calibration.encoder import CalibrationSettings  # noqa: PLC0415
    from fastdeploy_lite.calibration.tuning import TuningSettings  # noqa: PLC0415

    if args.num_threads is not None:
        _ops_cpu.set_num_threads(args.num_threads)
        blas.set_num_threads(args.num_threads)
    measured = args.int4_layers == MEASURED
    report = convert.quantize_with_calibration(
        args.model,
        args.output,
        convert.CalibrationText(args.calibration, args.calibration_tokens, seed=args.seed),
        CalibrationSettings(method=args.calibration_method, row_order=args.row_order),
        scheme=args.scheme,
        w4_end_layer=args.moe_w4_end_layer,
        w4_layers=None if measured else args.int4_layers,
        dense=args.dense,
        measured_bits=args.bits if measured else None,
        tuning=None if args.tune is None else TuningSettings(epochs=args.tune),
        card=args.card,
        shard_bytes=args.shard_size,
        force=args.force,
        progress=not args.quiet,
        keep_every=args.keep_every,
    )
    return convert.summary(report)


def summary(report: ConversionReport) -> str:
    """A line on sizes and time, one for each format with its error, and what is not known."""
    mebibyte = float(1 << 20)
    lines = [
        f"{report.input_bytes / mebibyte:.1f} MiB -> {report.output_bytes / mebibyte:.1f} MiB "
        f"in {report.seconds:.1f} s"
    ]
    for name, kind in sorted(report.kinds.items()):
        rounded = f", {kind.relative_rounding_error:.5f} rounded to nearest"
        lines.append(
            f"{name:>5}: {kind.weights / 1e6:10.2f} M weights, {kind.bits_per_weight:.3f} bits "
            f"each, relative squared error of weights {kind.relative_error:.5f}"
            f"{rounded if name == 'ccq' else ''}"
        )
    lines.append(
        "see report.html in the output folder; errors of outputs and the experts' traffic are not "
        "in it: they need --calibration"
    )
    return "\n".join(lines)


def parse_size(text: str) -> int:
    """Bytes from `500M`, `4G`, `4GB`, `4GiB` or a plain number; at least 1 MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 500M or 4G")
    size = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if size < _SMALLEST_SHARD:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected at least 1M")
    return size


def parse_code(text: str) -> tuple[float, float]:
    """(code_scale, code_zp) from `128.5,0`."""
    try:
        scale, zero = (float(part) for part in text.split(","))
        if not (math.isfinite(scale) and math.isfinite(zero)):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected code_scale,code_zp such as 120.94,1262"
        ) from None
    return scale, zero
