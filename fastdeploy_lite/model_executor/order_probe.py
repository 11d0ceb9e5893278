"""Which row order of 2-bit experts reads a text better: asked where the weights do not say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats.ccq import RowOrder
from fastdeploy_lite.utils.errors import CheckpointError, one_line

Floats: TypeAlias = npt.NDArray[np.float64]

TEXT = (
    "The river runs from the mountains to the sea. In spring the snow melts and the water rises; "
    "in summer it is low and clear, and children play on the stones. A bridge is a structure that "
    "carries a road over a river. People who live near the water learn to read the sky: dark "
    "clouds in the west mean rain before the evening.\n"
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。\n"
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n"
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n"
    "User: What is the capital of France?\nAssistant: The capital of France is Paris.\n"
    "One, two, three, four, five, six, seven, eight, nine, ten. Monday, Tuesday, Wednesday, "
    "Thursday, Friday, Saturday, Sunday. In the beginning God created the heaven and the earth.\n"
)
"""Some hundred tokens that a trained language model of English or Chinese predicts well."""
DECISIVE = 5.0
"""Standard errors of the mean difference a token that the orders must be apart."""
LEAST_GAIN = 1.0
"""Nats a token by which the better order must beat a uniform guess: noise never does."""


def encode(folder: Path, vocab_size: int) -> list[int]:
    """Return the text's token ids by the tokenizer in `folder`.

    Raises:
        CheckpointError: there is no tokenizer that can be read.
    """
    model = folder / "tokenizer.model"
    try:
        if model.is_file():
            import sentencepiece  # noqa: PLC0415 - seldom needed

            ids = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(TEXT)
        else:
            from tokenizers import Tokenizer  # noqa: PLC0415 - seldom needed

            ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    except Exception as error:  # libraries raise whatever their parsers do
        raise CheckpointError(f"{folder}: no readable tokenizer: {one_line(error)}") from None
    return [int(i) for i in ids if 0 <= int(i) < vocab_size]


def log_probabilities(logits: npt.NDArray[np.float32], token_ids: list[int]) -> Floats:
    """Log-probability of every token after the first, given logits [T, V] after every token."""
    rows = logits[:-1].astype(np.float64)
    peak = rows.max(axis=1)
    normaliser = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=1))
    chosen: Floats = rows[np.arange(len(rows)), np.asarray(token_ids[1:])] - normaliser
    return chosen


def judge(scores: dict[Any, Floats], vocab_size: int) -> tuple[RowOrder | None, str]:
    """Return the order that reads the text better, None if neither clearly does, and why."""
    natural, permuted = scores["natural"], scores["permuted"]
    difference = natural - permuted
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) or math.inf
    distance = float(difference.mean()) / error
    better: RowOrder = "natural" if distance > 0 else "permuted"
    reason = (
        f"a text of {len(natural)} tokens has {-natural.mean():.2f} nats a token in natural and"
        f" {-permuted.mean():.2f} in permuted order ({abs(distance):.1f} standard errors apart)"
    )
    gain = math.log(vocab_size) + float(scores[better].mean())
    if not math.isfinite(distance) or abs(distance) < DECISIVE or gain < LEAST_GAIN:
        return None, reason
    return better, reason
