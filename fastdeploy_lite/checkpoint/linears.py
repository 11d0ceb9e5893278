"""Every linear map of the model: its name, sizes, and the part of it that one rank holds.

Sizes follow config.json; the tensor-parallel rules are FastDeploy's: heads for q/k/v, gate and up
halves separately, rows for o_proj and down_proj (docs/checkpoint_format.md, "Tensor parallelism").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from fastdeploy_lite import formats
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

Role = Literal["qkv_proj", "o_proj", "up_gate_proj", "down_proj"]


@dataclass(frozen=True)
class Linear:
    """One linear map y = x W, W [K, N].

    Attributes:
        module: key of its tensors without the suffix, such as `ernie.layers.0.mlp.down_proj`.
        role: what it is; `o_proj` and `down_proj` are split along K between ranks.
        kind: format of its weights by config.json (`resolve_kind` asks the file).
        whole_in: K of the unsharded model.
        segments: widths in the unsharded W of the linears that are fused in it, in order
            (q, k, v; gate, up; otherwise one).
        segment_modules: modules of those linears where a file keeps them apart.
        column_ranges: the columns [start, stop) of the unsharded W that are meant, in order.
        row_range: the rows of the unsharded W that are meant.
    """

    module: str
    role: Role
    kind: WeightKind
    layer: int
    expert: int | None
    whole_in: int
    segments: tuple[int, ...]
    segment_modules: tuple[str, ...]
    column_ranges: tuple[tuple[int, int], ...]
    row_range: tuple[int, int]

    @property
    def in_features(self) -> int:
        """K of the part that is meant."""
        return self.row_range[1] - self.row_range[0]

    @property
    def out_features(self) -> int:
        """N of the part that is meant."""
        return sum(stop - start for start, stop in self.column_ranges)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Module and width of each fused linear where a file keeps them apart; else empty."""
        widths = (stop - start for start, stop in self.column_ranges)
        return tuple(zip(self.segment_modules, widths, strict=False))

    def size_problem(self, kind: WeightKind) -> str | None:
        """Return why a matrix of these sizes cannot be stored as `kind`, None if it can."""
        k, n, format_ = self.in_features, self.out_features, formats.get(kind)
        if format_.fits(k, n):
            return None
        return (
            f"{self.module}: found K = {k}, N = {n}, expected multiples of {format_.row_unit} and"
            f" {format_.column_unit} for {kind} weights"
        )

    def whole(self) -> Linear:
        """The same linear, all of it."""
        stops = tuple(accumulate(self.segments))
        ranges = tuple(zip((0, *stops), stops, strict=False))
        return replace(self, column_ranges=ranges, row_range=(0, self.whole_in))


def model_linears(
    config: ModelConfig, tensor_parallel_size: int = 1, rank: int = 0
) -> Iterator[Linear]:
    """Yield all linears in the order of the model, as `rank` of `tensor_parallel_size` has them.

    Call `check_tensor_parallel` first: sizes that do not divide are not noticed here.
    """
    shard = _Shard(config, tensor_parallel_size, rank)
    for layer in range(config.num_hidden_layers):
        yield shard.qkv(layer)
        yield shard.o_proj(layer)
        prefix = f"ernie.layers.{layer}.mlp"
        if not config.is_moe_layer(layer):
            yield from shard.mlp(prefix, layer, config.intermediate_size, config.linear_kind)
            continue
        kind, width = config.expert_kind(layer), config.moe_intermediate_size
        for expert in range(config.moe_num_experts):
            yield from shard.mlp(f"{prefix}.experts.{expert}", layer, width, kind, expert)
        if config.shared_intermediate_size:
            width = config.shared_intermediate_size
            yield from shard.mlp(f"{prefix}.shared_experts", layer, width, config.linear_kind)


@dataclass(frozen=True)
class _Shard:
    config: ModelConfig
    size: int
    rank: int

    def qkv(self, layer: int) -> Linear:
        config, dim = self.config, self.config.head_dim
        query, key_value = config.num_attention_heads * dim, config.num_key_value_heads * dim
        if self.size > config.num_key_value_heads:  # each KV head serves several ranks
            head = self.rank * config.num_key_value_heads // self.size
            local = (head * dim, (head + 1) * dim)
        else:
            local = self._split(key_value)
        starts = (0, query, query + key_value)
        ranges = zip(starts, (self._split(query), local, local), strict=True)
        prefix = f"ernie.layers.{layer}.self_attn"
        return Linear(
            f"{prefix}.qkv_proj",
            "qkv_proj",
            config.linear_kind,
            layer,
            None,
            whole_in=config.hidden_size,
            segments=(query, key_value, key_value),
            segment_modules=tuple(f"{prefix}.{name}_proj" for name in "qkv"),
            column_ranges=tuple((at + start, at + stop) for at, (start, stop) in ranges),
            row_range=(0, config.hidden_size),
        )

    def o_proj(self, layer: int) -> Linear:
        config = self.config
        width = config.num_attention_heads * config.head_dim
        return Linear(
            f"ernie.layers.{layer}.self_attn.o_proj",
            "o_proj",
            config.linear_kind,
            layer,
            None,
            whole_in=width,
            segments=(config.hidden_size,),
            segment_modules=(),
            column_ranges=((0, config.hidden_size),),
            row_range=self._split(width),
        )

    def mlp(
        self, prefix: str, layer: int, width: int, kind: WeightKind, expert: int | None = None
    ) -> tuple[Linear, Linear]:
        hidden = self.config.hidden_size
        start, stop = self._split(width)
        up_gate = Linear(
            f"{prefix}.up_gate_proj",
            "up_gate_proj",
            kind,
            layer,
            expert,
            whole_in=hidden,
            segments=(width, width),
            segment_modules=(f"{prefix}.gate_proj", f"{prefix}.up_proj"),
            column_ranges=((start, stop), (width + start, width + stop)),
            row_range=(0, hidden),
        )
        down = Linear(
            f"{prefix}.down_proj",
            "down_proj",
            kind,
            layer,
            expert,
            whole_in=width,
            segments=(hidden,),
            segment_modules=(),
            column_ranges=((0, hidden),),
            row_range=(start, stop),
        )
        return up_gate, down

    def _split(self, width: int) -> tuple[int, int]:
        share = width // self.size
        return self.rank * share, (self.rank + 1) * share


def check_sizes(linears: Iterable[Linear], source: str) -> None:
    """Raise CheckpointError for the first linear whose sizes its format cannot hold.

    For formats that are still to be made; `inventory.verify` checks those that files hold.
    `source` is named in the error.
    """
    for linear in linears:
        problem = linear.size_problem(linear.kind)
        if problem:
            raise CheckpointError(f"{source}: {problem}")


def check_tensor_parallel(config: ModelConfig, tensor_parallel_size: int) -> None:
    """Raise ConfigError if the model cannot be split that way, naming a degree that works."""
    reason = _obstacle(config, tensor_parallel_size)
    if reason is None:
        return
    working = [str(t) for t in range(1, 129) if _obstacle(config, t) is None]
    advice = f"; this model allows {', '.join(working)}" if working else ""
    raise ConfigError(
        f"{config.source}: tensor_parallel_size {tensor_parallel_size}: {reason}{advice}"
    )


def _obstacle(config: ModelConfig, size: int) -> str | None:
    """Return why W matrices cannot be cut in `size` equal parts that their formats allow."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        return f"{heads} query heads do not divide"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads neither divide nor can be repeated"
    if config.vocab_size % size:
        return f"vocab_size {config.vocab_size} does not divide"
    qkv = _Shard(config, size, 0).qkv(0)
    if config.linear_kind != "dense" and (config.head_dim % 4 or qkv.out_features % 16):
        return f"{qkv.out_features} rows of q, k and v are not a multiple of 16"
    widths: list[tuple[str, int, WeightKind]] = [
        ("attention width", heads * config.head_dim, config.linear_kind)
    ]
    for layer in range(config.num_hidden_layers):
        if config.is_moe_layer(layer):
            kind = config.expert_kind(layer)
            widths.append(("moe_intermediate_size", config.moe_intermediate_size, kind))
            shared = config.shared_intermediate_size
            widths.append(("shared expert width", shared, config.linear_kind))
        else:
            widths.append(("intermediate_size", config.intermediate_size, config.linear_kind))
    for name, width, kind in dict.fromkeys(widths):
        unit = formats.get(kind).row_unit
        if width % (size * unit):
            return f"{name} {width} is not a multiple of {size} x {unit} ({kind} format)"
    return None
