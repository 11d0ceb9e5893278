#!/usr/bin/env python3
"""What the arithmetic of a card makes of the 2-bit experts of a model, on real activations.

    PYTHONPATH=tests python tests/oracles/expert_error.py rows MODEL_DIR --text heldout.jsonl
    PYTHONPATH=tests python tests/oracles/expert_error.py tails
    PYTHONPATH=tests python tests/oracles/expert_error.py model MODEL_DIR --text heldout.jsonl

rows: of every layer, all rows that its experts get from the text, and those that come out of
SwiGLU, times the experts' weights, against the float64 product of the same bf16 rows. The error of
a row is the root mean square over its results as a share of their standard deviation; printed are
the root mean square of all rows' and, in brackets, the largest. bf16: the same of rounding rows to
bf16, against float32 rows. tails: the same of random rows of which some elements are larger.

model: perplexity and divergence of the model with its routed experts so computed: rows, SwiGLU's
results and each expert's outputs bf16, all else as it is on a CPU. Divergence is from the model on
a CPU, and from the one with float64 products of the same bf16 rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from oracles.card_arithmetics import PRODUCTS, Product, Weight, exact
from oracles.digit_product import OFFSET
from oracles.ernie_float32 import Files
from oracles.ops import random_weight
from oracles.rowwise import nearest_bf16, silu_and_mul

from fastdeploy_lite.calibration.text import read_stream, windows
from fastdeploy_lite.entrypoints import evaluation
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.moe import MoE
from fastdeploy_lite.quantization import ccq
from fastdeploy_lite.worker.model_runner import ModelRunner

Arrays = dict[str, np.ndarray]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""x float32 [T, H], ids int32 [T, k] and weights float32 [T, k] of a call of a layer's experts."""
Answer = Callable[[Rows], np.ndarray | None]
"""What such a call gives, float32 [T, H]; None leaves it to the product."""
TAILS = ((0.0, 1), (0.01, 100), (0.01, 1000), (0.001, 100), (0.001, 1000))
"""Shares of the elements that are so many times as large as the others."""
TAIL_ROWS, TAIL_DEPTH, TAIL_COLUMNS = 256, 2560, 256


def round_bf16(x: np.ndarray) -> np.ndarray:
    """The nearest bf16 of each value, as float32."""
    bits = nearest_bf16(np.ascontiguousarray(x, np.float32))
    return (bits.astype(np.uint32) << 16).view(np.float32)


def weight_of(arrays: Arrays) -> Weight:
    """Of the five arrays of a 2-bit matrix."""
    codes = ccq.decode_codes(*(arrays[n] for n in ("quant_weight", "code_scale", "code_zp")))
    fields = (ccq.code_values(codes) + OFFSET).astype(np.uint8).transpose(0, 2, 1)
    return Weight(
        fields.reshape(-1, codes.shape[1]),
        ccq.unpack_local_scale(arrays["weight_scale"]),
        arrays["super_scales"],
    )


class Experts:
    """The 2-bit experts of one layer, from files that keep their rows in natural order."""

    def __init__(self, files: Files, layer: int) -> None:
        self._files, self._prefix = files, f"ernie.layers.{layer}.mlp.experts"
        self._read: dict[str, Weight] = {}

    def weight(self, expert: int, linear: str) -> Weight:
        """up_gate_proj or down_proj of one of them."""
        module = f"{self._prefix}.{expert}.{linear}"
        if module not in self._read:
            names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
            found = {name: self._files.floats(f"{module}.{name}") for name in names}
            self._read[module] = weight_of(found)
        return self._read[module]

    def outputs(self, rows: Rows, product: Product) -> np.ndarray:
        """What a card would give with this product: bf16 as float32 [T, H]."""
        x, ids, weights = rows
        x = round_bf16(x)
        slots = np.empty((*ids.shape, x.shape[1]), np.float32)
        for expert in np.unique(ids):
            tokens, places = np.nonzero(ids == expert)
            inner = silu_and_mul(product(x[tokens], self.weight(expert, "up_gate_proj")))
            values = product(round_bf16(inner), self.weight(expert, "down_proj"))
            slots[tokens, places] = round_bf16(values)
        return round_bf16((weights[:, :, None] * slots).sum(axis=1))


@contextmanager
def answered(answers: Mapping[int, Answer]) -> Iterator[None]:
    """Calls of experts are answered by those who stand under id(up_gate)."""
    own = ops.routed_experts

    def call(
        x: Any, ids: Any, weights: Any, up_gate: Any, down: Any, out: Any, scratch: Any
    ) -> None:
        given = answers.get(id(up_gate), lambda rows: None)
        found = given(tuple(ops.download(part).copy() for part in (x, ids, weights)))
        if found is None:
            own(x, ids, weights, up_gate, down, out, scratch)
        else:
            ops.upload(found, out)

    ops.routed_experts = call
    try:
        yield
    finally:
        ops.routed_experts = own


def mixtures(runner: ModelRunner) -> dict[int, int]:
    """id(up_gate) of the layers with experts, by layer."""
    layers = enumerate(runner.model.layers)
    return {n: id(layer.mlp.up_gate) for n, layer in layers if isinstance(layer.mlp, MoE)}


def captured(runner: ModelRunner, parts: Sequence[Sequence[int]]) -> dict[int, Rows]:
    """All rows that the experts of each layer get, in order."""
    seen: dict[int, list[Rows]] = {layer: [] for layer in mixtures(runner)}
    with answered({key: seen[layer].append for layer, key in mixtures(runner).items()}):
        for part in parts:
            for _ in runner.logits_chunks(part):
                pass
    return {n: tuple(map(np.concatenate, zip(*calls, strict=True))) for n, calls in seen.items()}


class Errors:
    """Errors of rows under several arithmetics, and how far their largest elements stick out."""

    def __init__(self) -> None:
        self._shares: dict[str, list[np.ndarray]] = {name: [] for name in (*PRODUCTS, "bf16")}
        self._peaks: list[np.ndarray] = []

    def add(self, rows: np.ndarray, weight: Weight) -> None:
        """Measure float32 rows [T, K] times a weight."""
        x = round_bf16(rows)
        x, rows = x[np.abs(x).max(axis=1) > 0], rows[np.abs(x).max(axis=1) > 0]
        wanted = exact(x, weight)
        for name, product in PRODUCTS.items():
            self._shares[name].append(shares(product(x, weight), wanted))
        self._shares["bf16"].append(shares(wanted, exact(rows, weight)))
        wide = x.astype(np.float64)
        self._peaks.append(np.abs(wide).max(axis=1) / np.sqrt((wide**2).mean(axis=1)))

    def __str__(self) -> str:
        peaks = np.concatenate(self._peaks)
        cells = [f"{len(peaks):,}", f"{np.median(peaks):.1f} ({peaks.max():.1f})"]
        for found in map(np.concatenate, self._shares.values()):
            cells.append(f"{np.sqrt((found**2).mean()):.1e} ({found.max():.1e})")
        return " | ".join(cells)


def shares(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Root mean square of each row's errors as a share of its results' standard deviation."""
    return np.sqrt(((found - wanted) ** 2).mean(axis=1)) / wanted.std(axis=1)


def print_heading(*first: str) -> None:
    names = [*first, "rows", "largest / rms", *PRODUCTS, "bf16"]
    print("|".join(["", *(f" {name} " for name in names), ""]))
    print("|---" * len(names) + "|")


def print_rows(model: Path, parts: Sequence[Sequence[int]]) -> None:
    """The table of a model's layers."""
    files = Files(model)
    seen = captured(evaluation.load_runner(model, max(map(len, parts)), "cpu"), parts)
    print_heading("layer", "product")
    for layer, (x, ids, _) in seen.items():
        experts, up_errors, down_errors = Experts(files, layer), Errors(), Errors()
        for expert in np.unique(ids):
            rows = x[(ids == expert).any(axis=1)]
            up = experts.weight(expert, "up_gate_proj")
            up_errors.add(rows, up)
            inner = silu_and_mul(exact(round_bf16(rows), up)).astype(np.float32)
            down_errors.add(inner, experts.weight(expert, "down_proj"))
        print(f"| {layer} | up_gate | {up_errors} |", flush=True)
        print(f"| {layer} | down | {down_errors} |", flush=True)


def print_tails() -> None:
    """The table of random rows."""
    print_heading("larger elements")
    for share, times in TAILS:
        random = np.random.default_rng(0)
        x = random.standard_normal((TAIL_ROWS, TAIL_DEPTH))
        x *= np.where(random.random(x.shape) < share, times, 1)
        errors = Errors()
        arrays, _ = random_weight("ccq", TAIL_DEPTH, TAIL_COLUMNS, random)
        errors.add(x.astype(np.float32), weight_of(arrays))
        print(f"| {f'{share:.1%}, {times} times' if share else 'none'} | {errors} |", flush=True)


def print_model(model: Path, parts: Sequence[Sequence[int]]) -> None:
    """The table of a whole model."""
    files, context = Files(model), max(map(len, parts))
    plain, *runners = (
        evaluation.load_runner(model, context, "cpu") for _ in range(2 + len(PRODUCTS))
    )
    products = {"exact": exact, **PRODUCTS}
    answers: dict[int, Answer] = {}
    for runner, product in zip(runners, products.values(), strict=True):
        for layer, key in mixtures(runner).items():
            answers[key] = answer_of(Experts(files, layer), product)
    with answered(answers):
        found = [evaluation.diverge_all(runners, plain, part) for part in parts]
        near = [evaluation.diverge_all(runners, runners[0], part) for part in parts]
    print(
        "| experts | perplexity | KL from a CPU | same likeliest | KL from exact | same likeliest |"
    )
    print("|---" * 6 + "|")
    reference = np.concatenate([one[0].reference_logprobs for one in found])
    print(f"| CPU | {np.exp(-reference.mean()):.4f} | | | | |")
    for index, name in enumerate(products):
        logprobs = np.concatenate([one[index].logprobs for one in found])
        cells = [distance([one[index] for one in table]) for table in (found, near)]
        print(f"| {name} | {np.exp(-logprobs.mean()):.4f} | {' | '.join(cells)} |", flush=True)


def answer_of(experts: Experts, product: Product) -> Answer:
    return lambda rows: experts.outputs(rows, product)


def distance(parts: Sequence[evaluation.Divergence]) -> str:
    """Two cells: KL with its interval, and the share of tokens with the same likeliest one."""
    kl, (low, high) = evaluation.mean_interval([part.kl for part in parts])
    same = np.concatenate([part.same_top for part in parts]).mean()
    return f"{kl:.1e} ({low:.1e} to {high:.1e}) | {same:.2%}"


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("table", choices=("rows", "tails", "model"))
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--text", type=Path, help="JSON lines as in evaluate.py")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--limit", type=int, default=20000, help="the text's first tokens")
    args = parser.parse_args()
    if args.table == "tails":
        print_tails()
        return
    if args.model is None or args.text is None:
        parser.error("a model and --text are missing")
    stream = read_stream(Ernie4_5Tokenizer.from_pretrained(str(args.model)), args.text)
    parts = list(windows(stream, args.context, args.limit))
    {"rows": print_rows, "model": print_model}[args.table](args.model, parts)


if __name__ == "__main__":
    main()
