"""Paddle-named tensors in the form in which transformers writes the same model.

Compared once with `save_pretrained` of transformers 5.24 on the demo's bf16 weights: the same keys,
shapes and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tiny_model import Tensors, split_fused

_LEFT_OUT = ("moe_use_aux_free", "use_rmsnorm", "torch_dtype", "moe_gate", "compression_ratio")


def hugging_face_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json as transformers 5 writes it."""
    result = {k: v for k, v in config.items() if k not in _LEFT_OUT}
    theta = result.pop("rope_theta")
    return result | {
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "transformers_version": "5.24.0",
    }


def hugging_face_tensors(
    config: Mapping[str, Any], tensors: Tensors, *, stacked: bool = False
) -> Tensors:
    """Return the tensors under Hugging Face names, linears as [out, in].

    stacked: all experts of a layer in one tensor, as transformers keeps them in memory.
    """
    result: Tensors = {}
    for key, (matrix, dtype) in split_fused(config, tensors).items():
        name = "model." + key.removeprefix("ernie.") if key.startswith("ernie.") else key
        is_matrix = matrix.ndim == 2 and (".self_attn." in key or ".mlp." in key)
        turned = (is_matrix and not key.endswith("bias")) or key == "lm_head.weight"
        result[name] = (np.ascontiguousarray(matrix.T) if turned else matrix, dtype)
    return _stack(result) if stacked else result


def _stack(tensors: Tensors) -> Tensors:
    result = {key: value for key, value in tensors.items() if ".experts." not in key}
    layers = sorted({key.partition(".experts.")[0] for key in tensors if ".experts." in key})
    for prefix in (f"{layer}.experts" for layer in layers):
        count = len({key for key in tensors if key.startswith(f"{prefix}.") and "down" in key})
        parts = {
            name: [tensors[f"{prefix}.{e}.{name}_proj.weight"][0] for e in range(count)]
            for name in ("gate", "up", "down")
        }
        gate_up = np.stack(
            [np.concatenate(p) for p in zip(parts["gate"], parts["up"], strict=True)]
        )
        result[f"{prefix}.gate_up_proj"] = (gate_up, "BF16")
        result[f"{prefix}.down_proj"] = (np.stack(parts["down"]), "BF16")
    return result
