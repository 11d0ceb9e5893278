"""Which part of each linear map one tensor-parallel rank holds.

The rules are FastDeploy's: heads for q, k and v, gate and up halves separately, rows for o_proj and
down_proj (docs/checkpoint_format.md, "Tensor parallelism"). Where a format's steps of rows do not
divide, or query heads that share a KV head, some ranks get one more.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdeploy_lite import formats
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """Makes the linears of one rank; families name them and put them in order.

    Attributes:
        config: sizes and formats.
        size: number of ranks.
        rank: which of them.
    """

    config: ModelConfig
    size: int = 1
    rank: int = 0

    def qkv(self, prefix: str, layer: int) -> Linear:
        """Query, key and value projections side by side: `prefix`.qkv_proj."""
        config, dim = self.config, self.config.head_dim
        query, key_value = config.num_attention_heads * dim, config.num_key_value_heads * dim
        if self.size > config.num_key_value_heads:  # each KV head serves several ranks
            head = self.rank * config.num_key_value_heads // self.size
            local = (head * dim, (head + 1) * dim)
        else:
            local = self._split(key_value, dim)
        starts = (0, query, query + key_value)
        ranges = zip(starts, (self._split(query, dim), local, local), strict=True)
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

    def o_proj(self, prefix: str, layer: int) -> Linear:
        """Output projection of attention: `prefix`.o_proj."""
        config = self.config
        width = config.num_attention_heads * config.head_dim
        return Linear(
            f"{prefix}.o_proj",
            "o_proj",
            config.linear_kind,
            layer,
            None,
            whole_in=width,
            segments=(config.hidden_size,),
            segment_modules=(),
            column_ranges=((0, config.hidden_size),),
            row_range=self._split(width, config.head_dim),
        )

    def mlp(
        self, prefix: str, layer: int, width: int, kind: WeightKind, expert: int | None = None
    ) -> tuple[Linear, Linear]:
        """Gate and up side by side, and down, of a SwiGLU block of `width`."""
        hidden = self.config.hidden_size
        start, stop = self._split(width, formats.get(kind).row_unit)
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

    def _split(self, width: int, unit: int = 1) -> tuple[int, int]:
        """This rank's stretch of `width`, in whole steps of `unit`.

        The boundaries of few ranks are among those of twice as many, so that folders that were cut
        for the few can be cut further.
        """
        steps = width // unit
        start, stop = (at * steps // self.size * unit for at in (self.rank, self.rank + 1))
        return start, width if self.rank + 1 == self.size else stop


def check_tensor_parallel(
    config: ModelConfig, tensor_parallel_size: int, for_files: bool = False
) -> None:
    """Raise ConfigError if the model cannot be split that way, naming a degree that works.

    for_files: whether folders are to be written, which cannot hold empty parts.
    """
    reason = obstacle(config, tensor_parallel_size, for_files)
    if reason is None:
        return
    working = [str(t) for t in range(1, 65) if obstacle(config, t, for_files) is None]
    advice = f"; this model allows {', '.join(working)}" if working else ""
    raise ConfigError(
        f"{config.source}: tensor_parallel_size {tensor_parallel_size}: {reason}{advice}"
    )


def obstacle(config: ModelConfig, size: int, for_files: bool = False) -> str | None:
    """Return why the matrices cannot be cut in `size` parts that their formats allow.

    Routed experts with fewer steps of rows than there are ranks leave some ranks without a part,
    which files cannot hold.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads < size:
        return f"{heads} query heads are too few"
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads neither divide nor can be repeated"
    if config.vocab_size % size:
        return f"vocab_size {config.vocab_size} does not divide"
    for rank in range(size if config.linear_kind != "dense" else 0):
        qkv = Shard(config, size, rank).qkv("", 0)
        if config.head_dim % 4 or qkv.out_features % 16:
            return f"{qkv.out_features} rows of q, k and v are not a multiple of 16"
    return _attention_obstacle(config, size) or _width_obstacle(config, size, for_files)


def _attention_obstacle(config: ModelConfig, size: int) -> str | None:
    unit = formats.get(config.linear_kind).row_unit
    for rank in range(size):  # whole heads
        start, stop = Shard(config, size, rank).o_proj("", 0).row_range
        if start % unit or stop % unit:
            return (
                f"attention width [{start}, {stop}) is not in steps of {unit}"
                f" ({config.linear_kind} format)"
            )
    return None


def _width_obstacle(config: ModelConfig, size: int, for_files: bool) -> str | None:
    widths: list[tuple[str, int, WeightKind]] = []
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
        if width % unit:
            return f"{name} {width} is not a multiple of {unit} ({kind} format)"
        may_be_empty = name == "moe_intermediate_size" and not for_files
        if 0 < width // unit < size and not may_be_empty:
            return f"{name} {width} is less than {size} x {unit} ({kind} format)"
    return None
