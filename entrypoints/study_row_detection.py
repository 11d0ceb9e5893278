#!/usr/bin/env python3
"""How surely the row order of 2-bit experts is told from files whose order is known.

    fastdeploy-lite quantize --model BF16_DIR --output DIR --scheme 2bits --row-order permuted
    python entrypoints/study_row_detection.py DIR...

DIR: what `quantize` wrote; the order in its config.json is taken for the truth and not looked at
by the detection. For each folder: the evidence of every layer alone, how many of a thousand random
samples of experts of the size that loading starts with are right, wrong and undecided, and what
is found when every expert is paired with the down_proj of another one, where nothing can be found.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdeploy_lite.checkpoint import Checkpoint, row_order

SAMPLES = 1000


class Expert(NamedTuple):
    """What an expert shows, and what it shows beside the down_proj of the next one."""

    layer: int
    own: tuple[float, float, int]
    foreign: tuple[float, float, int]


def experts(checkpoint: Checkpoint) -> list[Expert]:
    """Correlations of every 2-bit expert, in the order of layers and experts."""
    firsts = list(row_order.first_halves(checkpoint))
    pairs = [row_order.expert_arrays(checkpoint, linear) for linear in firsts]
    found = []
    for index, (linear, (up_gate, down)) in enumerate(zip(firsts, pairs, strict=True)):
        foreign = pairs[(index + 1) % len(pairs)][1]
        own = row_order.expert_correlations(up_gate, down)
        found.append(Expert(linear.layer, own, row_order.expert_correlations(up_gate, foreign)))
    return found


def study(folder: Path) -> bool:
    """Print what is found; whether every layer and every sample was told right."""
    checkpoint = Checkpoint.open(folder)
    quantization = checkpoint.config.quantization
    truth = None if quantization is None else quantization.row_order
    if truth is None:
        raise SystemExit(f"{folder}: its config.json names no row order to compare with")
    found = experts(checkpoint)
    if len(found) < row_order.ROUNDS[0]:
        raise SystemExit(f"{folder}: {len(found)} 2-bit experts, {row_order.ROUNDS[0]} are needed")
    print(f"{folder}: {len(found)} experts, written in {truth} order")
    layers = sorted({one.layer for one in found})
    alone = {at: row_order.weigh([one.own for one in found if one.layer == at]) for at in layers}
    for at, evidence in alone.items():
        print(f"  layer {at} alone: {evidence.order}; {evidence}")
    random = np.random.default_rng(0)
    size = row_order.ROUNDS[0]
    samples, strangers = Counter[str](), Counter[str]()
    for _ in range(SAMPLES):
        chosen = [found[i] for i in random.choice(len(found), size, replace=False)]
        samples[str(row_order.weigh([one.own for one in chosen]).order)] += 1
        strangers[str(row_order.weigh([one.foreign for one in chosen]).order)] += 1
    print(f"  {SAMPLES} samples of {size} experts: {dict(samples)}")
    print(f"  the same with another expert's down_proj: {dict(strangers)}")
    is_right = all(evidence.order == truth for evidence in alone.values())
    return is_right and set(samples) == {truth} and set(strangers) == {"None"}


def main() -> int:
    """Study each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    args = parser.parse_args()
    right = [study(folder) for folder in args.folders]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
