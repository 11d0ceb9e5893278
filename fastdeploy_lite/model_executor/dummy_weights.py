"""Parameters made up for runs without files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import paddle

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.expert_placement import NO_LINKS
from fastdeploy_lite.model_executor.ops import ExpertWeight, HostLink, HostWeight, PackedWeight
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization_config import WeightKind


class DummySource:
    """Valid random weights of any architecture, made where they are kept.

    Norms are ones and the router is random, so activations stay finite and experts are used evenly;
    the text means nothing.
    """

    row_order = ""
    is_permuted = False
    host_links: Mapping[int, HostLink] = NO_LINKS

    def __init__(self, config: RuntimeConfig, place: Any) -> None:
        """Args: config: its model, parallel and seed matter; place: where weights are kept."""
        self.config: ModelConfig = config.model
        self.place = place
        self.head_kind = config.load.head_kind
        self.seed = config.seed
        parallel = config.parallel
        self._ranks = parallel.tensor_parallel_size
        linears = model_linears(config.model, parallel.tensor_parallel_size, parallel.rank)
        self._linears = {linear.module: linear for linear in linears}

    @property
    def nbytes(self) -> int:
        """Bytes of what will be made."""
        tables = formats.get("dense").nbytes(*self._table_sizes())
        experts = sum(
            formats.get(linear.kind).nbytes(linear.in_features, linear.out_features)
            for linear in self._linears.values()
        )
        return tables * (1 if self.config.tie_word_embeddings else 2) + experts

    def __enter__(self) -> DummySource:
        """Begin loading."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def layers(self, count: int) -> Iterator[int]:
        """See ParameterSource."""
        return iter(range(count))

    def linear(self, module: str) -> PackedWeight:
        """See ParameterSource."""
        linear = self._linears[module]
        sizes = (linear.in_features, linear.out_features)
        return self._random(module, linear.kind, *sizes, self.place)

    def experts(self, layer: int, name: str) -> ExpertWeight | None:
        """See ParameterSource."""
        first = self._linears[self.config.family.expert_module(layer, 0, name)]
        sizes = (first.in_features, first.out_features)
        if not sizes[0] * sizes[1]:
            return None
        link, count = self.host_links.get(layer), self.config.moe_num_experts
        if link is None:
            return self._random(first.module, first.kind, *sizes, self.place, count)
        return HostWeight(self._random(first.module, first.kind, *sizes, link.place, count), link)

    def embedding(self) -> PackedWeight:
        """See ParameterSource."""
        return self._random("embed_tokens", "dense", *self._table_sizes(), self.place)

    def head(self) -> PackedWeight | None:
        """See ParameterSource."""
        if self.config.tie_word_embeddings and self.head_kind == "dense":
            return None
        return self._random("lm_head", self.head_kind, *self._table_sizes(), self.place)

    def vector(self, key: str) -> Any:
        """See ParameterSource."""
        return paddle.to_tensor(np.ones(self.config.hidden_size, np.float32), place=self.place)

    def router(self, layer: int) -> tuple[Any, Any | None]:
        """See ParameterSource."""
        config = self.config
        generator = np.random.default_rng((self.seed, layer))
        shape = (config.hidden_size, config.moe_num_experts)
        gate = generator.standard_normal(shape, np.float32) * np.float32(0.02)
        bias = None
        if config.moe_use_aux_free:
            zeros = np.zeros(config.moe_num_experts, np.float32)
            bias = paddle.to_tensor(zeros, place=self.place)
        return paddle.to_tensor(gate, place=self.place), bias

    def _table_sizes(self) -> tuple[int, int]:
        return self.config.hidden_size, self.config.vocab_size // self._ranks

    def _random(
        self, name: str, kind: WeightKind, rows: int, columns: int, place: Any, experts: int = 0
    ) -> PackedWeight:
        kernel = formats.get(kind).kernel
        weight = ops.allocate_weight(kernel, rows, columns, place, num_experts=experts)
        ops.randomize_weight(weight, self.seed ^ zlib.crc32(name.encode()))
        ops.finish_weight(weight)
        return weight
