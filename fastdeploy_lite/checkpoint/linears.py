"""The linears of a model by its family; `models.linear` and `models.sharding` make them."""

from __future__ import annotations

from collections.abc import Iterator

from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.models.linear import Linear, check_sizes
from fastdeploy_lite.models.sharding import check_tensor_parallel

__all__ = ["Linear", "check_sizes", "check_tensor_parallel", "model_linears"]


def model_linears(
    config: ModelConfig, tensor_parallel_size: int = 1, rank: int = 0
) -> Iterator[Linear]:
    """Yield all linears in the order of the model, as `rank` of `tensor_parallel_size` has them.

    Call `check_tensor_parallel` first: sizes that do not divide are not noticed here.
    """
    return config.family.linears(config, tensor_parallel_size, rank)
