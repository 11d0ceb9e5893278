"""`fastdeploy-lite inspect DIR`: what is in a model folder, without loading it."""

from __future__ import annotations

import argparse
import json
import sys

from fastdeploy_lite.checkpoint.hub import resolve_model
from fastdeploy_lite.checkpoint.inspection import Inspection, inspect
from fastdeploy_lite.checkpoint.row_order import NO_EXPERTS
from fastdeploy_lite.utils.errors import FastDeployError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.description = (
        "Describe a model folder: formats, layer ranges, row order of 2-bit experts, sizes, "
        "tensor-parallel sizes, what is missing or odd. Nothing is loaded. Exit status 1 if the "
        "folder could not be run."
    )
    parser.add_argument("model", metavar="DIR", help="folder of the model, or demo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description; 1 where the folder has problems."""
    try:
        found = inspect(resolve_model(args.model, None))
    except FastDeployError as error:
        print(f"fastdeploy-lite inspect: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict(), ensure_ascii=False) if args.json else table(found))
    return 1 if found.problems else 0


def table(found: Inspection) -> str:
    """The description as text."""
    sizes = ", ".join(f"{name} {value}" for name, value in found.sizes.items())
    tied = {True: "true", False: "false", None: "absent"}[found.tied_by_config]
    rows = [
        ("folder", found.folder),
        ("architecture", found.architecture or "unknown"),
        ("sizes", sizes),
        ("names", found.spelling),
        ("files", f"{found.files} with {found.tensors} tensors, {_size(found.nbytes)}"),
        ("rank folders", str(found.rank_folders) if found.rank_folders else "none"),
        ("runs at TP", ", ".join(map(str, found.tensor_parallel_sizes)) or "none"),
        ("2-bit rows", _row_order(found)),
        ("embedding", f"{found.embedding}; head {found.head}; tie_word_embeddings {tied}"),
        ("scales", ", ".join(f"{n} {d}" for d, n in found.scale_dtypes.items()) or "none"),
        ("draft tensors", str(found.draft_tensors) if found.draft_tensors else "none"),
        ("beside", ", ".join(found.side_files) or "none"),
        ("absent", ", ".join(found.missing_side_files) or "none"),
        ("unused", ", ".join(found.unused) or "none"),
    ]
    lines = [f"{name:14}{value}" for name, value in rows]
    if found.stacks:
        lines += [
            "",
            f"{'linears':22}{'layers':>9} {'format':8}{'bits':>7}{'size':>11}{'deviation':>12}",
        ]
    for stack in found.stacks:
        layers = f"{stack.first_layer}-{stack.last_layer}"
        deviation = "" if stack.deviation is None else f"{stack.deviation:.4g}"
        lines.append(
            f"{stack.linears:>6} {stack.role:15}{layers:>9} {stack.format:8}"
            f"{stack.bits_per_weight:7.3f}{_size(stack.nbytes):>11}{deviation:>12}"
        )
    for title, texts in (("remark", found.remarks), ("problem", found.problems)):
        lines += [f"{title}: {text}" for text in texts]
    return "\n".join(lines)


def _row_order(found: Inspection) -> str:
    if found.row_order_reason in ("", NO_EXPERTS):
        return found.row_order_reason or "not looked at"
    return f"{found.row_order or 'unknown'}: {found.row_order_reason}"


def _size(nbytes: int) -> str:
    value, units = float(nbytes), ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if value < 1024 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
