"""Prediction layers for tests: a random one, and one fitted to the demo model.

The fitted one is a ridge regression from what the layer sees (a token and the hidden state before
it) to the model's own next hidden state, with nothing in its block; so it is right often enough to
be useful, and costs a few seconds.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from model_driver import make_runner
from tiny_model import Tensors, random_linear, write_tensors

from fastdeploy_lite import assets
from fastdeploy_lite.checkpoint.reader import Checkpoint
from fastdeploy_lite.checkpoint.tensor import float32_to_bfloat16
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer

BLOCK = "ernie.mtp_block.0"
RIDGE = 1e-2


def bf16(values: Any) -> tuple[Any, str]:
    return float32_to_bfloat16(np.ascontiguousarray(values, dtype=np.float32)), "BF16"


def random_layer(config: ModelConfig, seed: int = 0) -> Tensors:
    """Every tensor of a layer; activations keep their size."""
    random, hidden = np.random.default_rng(seed), config.hidden_size
    tensors: Tensors = {
        key: bf16(random.uniform(0.5, 1.5, hidden))
        for key in (
            "ernie.mtp_emb_norm.0.weight",
            "ernie.mtp_hidden_norm.0.weight",
            f"{BLOCK}.input_layernorm.weight",
            f"{BLOCK}.post_attention_layernorm.weight",
        )
    }
    matrix = random.standard_normal((2 * hidden, hidden)) / np.sqrt(2 * hidden)
    tensors["ernie.mtp_linear_proj.0.weight"] = bf16(matrix)
    for linear in config.family.draft_linears(config):
        tensors |= random_linear(dataclasses.replace(linear, kind="dense"), random)
    return tensors


def write_layer(folder: Path, tensors: Tensors) -> Path:
    """Write a folder with these tensors alone; return it."""
    write_tensors(folder, None, tensors)
    return folder


def write_fitted_layer(folder: Path, model: Path, windows: int = 8) -> Path:
    """Write a layer that guesses as a linear map can; fitted to the packaged sample of text."""
    runner = make_runner(model, tokens=1024, length=1024)
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(model))
    with gzip.open(assets.__path__[0] + "/calibration.jsonl.gz", "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    text = "\n".join(entry["messages"][-1]["content"] for entry in entries if "messages" in entry)
    config, hidden = runner.config.model, runner.config.model.hidden_size
    checkpoint = Checkpoint.open(model)
    table = checkpoint.get(config.family.embedding_key).float32()
    gain = checkpoint.get("ernie.norm.weight").float32()
    square, product = np.zeros((2 * hidden, 2 * hidden)), np.zeros((2 * hidden, hidden))
    tokens = np.array(tokenizer.encode_text(text), np.int32)[: windows * 1024]
    for start in range(0, len(tokens) - 1, 1024):
        window = tokens[start : start + 1024]
        batch = runner._own_batch(window, [len(window)], 0, 16, runner._new_caches(16))
        states = np.asarray(runner.model(batch).numpy(), np.float32)
        seen = np.concatenate([unit(table[window[1:-1]]), unit(states[:-2])], axis=1)
        square += seen.T @ seen
        product += seen.T @ unit(states[1:-1] / gain)
    square += RIDGE * len(tokens) * np.eye(2 * hidden)
    tensors = random_layer(config)
    for key, (array, dtype) in tensors.items():
        ones = np.ones_like(array, np.float32)
        tensors[key] = bf16(ones) if "norm" in key else (np.zeros_like(array), dtype)
    tensors["ernie.mtp_linear_proj.0.weight"] = bf16(np.linalg.solve(square, product))
    return write_layer(folder, tensors)


def unit(rows: Any) -> Any:
    return rows / np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5)
