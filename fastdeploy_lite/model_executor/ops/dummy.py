"""Random weights that are valid in every form, for runs of a model whose files are not there."""

from __future__ import annotations

import numpy as np

from fastdeploy_lite import formats
from fastdeploy_lite.model_executor.ops._dispatch import native, place_kind
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight
from fastdeploy_lite.model_executor.ops.weights import fill_weight


def randomize_weight(weight: PackedWeight, seed: int) -> None:
    """Fill a fresh weight, all experts, with elements of deviation about K^-0.5.

    That size keeps activations steady from layer to layer. On a card the codes are made there.

    Args:
        weight: from `allocate_weight`; `finish_weight` is still to be called.
        seed: equal seeds give equal weights on one kind of place.
    """
    if place_kind(weight.place) == "cuda":
        native("cuda", "randomize_weight")(weight, seed)
        return
    random = np.random.default_rng(seed)
    format_ = formats.get(weight.kind)
    experts = range(weight.num_experts) if weight.num_experts else [None]
    for expert in experts:
        arrays = format_.random(random, weight.in_features, weight.out_features)
        fill_weight(weight, expert, **arrays)
