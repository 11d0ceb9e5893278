#!/usr/bin/env python3
"""How near the 2-bit encoder comes to the best that the format holds, on columns of Gaussian rows.

    python entrypoints/study_codes.py --rows 8192 --columns 32 --codes 1,16,32,64

For every number of codes, the first of the table, among which each column chooses: the relative
squared error of the encoder; that of its codes if for each of them all local scales of every group
and seven super scales are tried together; and that if every group may take the best of 17 scales
that are not rounded. So the first two differ by what the encoder's alternation leaves, the last two
by what 4-bit scales cost, and what is left is the codes'.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats.ccq import GROUP_ROWS, MAX_LOCAL_SCALE, WEIGHTS_PER_BYTE
from fastdeploy_lite.quantization import ccq_search
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.code_search import code_books, search

ArrayF32 = npt.NDArray[np.float32]
SUPER_FACTORS = (0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1)
"""Tried beside the super scale that the encoder takes with a code."""
SCALE_FACTORS = np.linspace(0.053, 0.073, 17)
"""Unrounded scales of a group over its root mean square; 0.062 is best on average."""
_METRIC = np.tile(
    np.eye(WEIGHTS_PER_BYTE, dtype=np.float32), (GROUP_ROWS // WEIGHTS_PER_BYTE, 1, 1)
)


def best_errors(weight: ArrayF32, code: tuple[float, float]) -> npt.NDArray[np.float64]:
    """Squared errors of every column of [K, N] with one code: [2, N], rounded scales and free."""
    columns = weight.shape[1]
    groups = np.ascontiguousarray(weight.T).reshape(-1, GROUP_ROWS)
    book, chosen = code_books(np.array([code], np.float32)), np.zeros(len(groups), np.int32)

    def least(scales: Sequence[ArrayF32]) -> npt.NDArray[np.float64]:
        found = [
            search(groups, groups, _METRIC, book, chosen, scale.reshape(-1, 1)).loss
            for scale in scales
        ]
        return np.min(found, axis=0).reshape(columns, -1).sum(axis=1, dtype=np.float64)

    own = ccq_search.encode(weight, codes=[code]).super_scale
    rounded = []
    for factor in SUPER_FACTORS:
        trial = ccq_search.round_to_bfloat16(own * np.float32(factor))
        per_group = np.repeat(trial, len(groups) // columns)
        local = np.arange(1, MAX_LOCAL_SCALE + 1, dtype=np.float32)
        rounded.append(least([per_group * step for step in local]))
    rms = np.sqrt(np.square(groups).mean(axis=1))
    free = least([rms * np.float32(factor) for factor in SCALE_FACTORS])
    return np.stack([np.min(rounded, axis=0), free])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=8192, metavar="K", help="a multiple of 128")
    parser.add_argument("--columns", type=int, default=32, metavar="N")
    parser.add_argument("--codes", default="1,16,32,64", help="numbers of codes, in rising order")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args(arguments)
    shape = args.rows, args.columns
    weight = np.random.default_rng(args.seed).standard_normal(shape, np.float32)
    energy = float(np.square(weight, dtype=np.float64).sum())
    print("| codes | encoder | ms a million | all scales together | scales not rounded |")
    print("|---|---|---|---|---|")
    best = np.empty((0, 2, args.columns))
    for count in map(int, args.codes.split(",")):
        started = time.process_time()
        encoded = ccq_search.encode(weight, codes=CODES[:count])
        spent = (time.process_time() - started) * 1e9 / weight.size
        error = ccq_search.relative_error(weight, encoded)
        more = [best_errors(weight, code) for code in CODES[len(best) : count]]
        best = np.concatenate([best, *(found[None] for found in more)])
        together, free = best.min(axis=0).sum(axis=1) / energy
        cells = (f"{error:.4f}", f"{spent:.0f}", f"{together:.4f}", f"{free:.4f}")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
