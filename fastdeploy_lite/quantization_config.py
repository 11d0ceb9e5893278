"""How weights are kept: the `quantization_config` of config.json and what `--quantization` asks.

Shapes and rules follow FastDeploy's published models; docs/checkpoint_format.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from fastdeploy_lite import formats
from fastdeploy_lite.formats.ccq import ROW_ORDERS, RowOrder
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.json_fields import JsonFields

WeightKind: TypeAlias = str
"""Name of a format in `formats`: dense, int8, int4, ccq, or one that was registered."""
LinearKind: TypeAlias = WeightKind

SUPPORTED_QUANTIZATION = ("wint2", "wint4", "wint8", "mix_quant")
ONLINE_QUANTIZATION = ("wint4", "wint8", "mix_quant")  # can be made while bf16 weights are loaded
# Names that FastDeploy knows and this project does not read; an unknown name is another error.
_OTHER_QUANTIZATION = (
    "block_wise_fp8",
    "kvcache",
    "modelopt_fp4",
    "mxfp4",
    "tensor_wise_fp8",
    "w4a8",
    "w4afp8",
    "w8a8",
    "weight_only",
    "wfp8afp8",
    "wint2.5",
    "wint25",
)
_DEFAULT_W4_END_LAYER = 6  # FastDeploy's, for a scheme that names no range


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization_config` object of config.json, reduced to what decides the formats.

    Attributes:
        quantization: the scheme's name: wint2, wint4, wint8 or mix_quant.
        dense_quant_type: wint8 or wint4, for every linear that is not a routed expert.
        moe_quant_type: w4w2 (scheme wint2), wint4 or wint8, for routed experts.
        w4_end_layer: last decoder layer (0-based, inclusive) whose experts are wint4 under w4w2.
        w4_layers: the layers whose experts are wint4 where they were chosen one by one, by this
            project's own key; None where w4_end_layer says it all.
        w4_start_layer, w2_start_layer, w2_end_layer: kept for writing; they decide nothing.
        row_order: how 2-bit experts store their rows, by this project's own key; None where the
            file does not say.
    """

    quantization: str = "wint2"
    dense_quant_type: str = "wint8"
    moe_quant_type: str = "w4w2"
    w4_start_layer: int = 0
    w4_end_layer: int = _DEFAULT_W4_END_LAYER
    w2_start_layer: int = _DEFAULT_W4_END_LAYER + 1
    w2_end_layer: int | None = None
    row_order: RowOrder | None = None
    w4_layers: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> QuantizationConfig:
        """Parse the published shape; raise ConfigError for anything that cannot be read."""
        fields = JsonFields(data, source, "quantization_config.")
        scheme = _scheme_name(fields, SUPPORTED_QUANTIZATION)
        _refuse_kv_cache_quantization(fields)
        return cls._from_wint2(fields) if scheme == "wint2" else cls._from_integers(scheme, fields)

    @classmethod
    def online(cls, wanted: str | Mapping[str, Any]) -> QuantizationConfig:
        """What `--quantization` asks to be made of bf16 weights while they are loaded.

        Args:
            wanted: wint8 (everything int8), wint4 (int8 with int4 experts), or an object as in
                config.json; mix_quant needs its dense_quant_type and moe_quant_type.

        Raises:
            ConfigError: another scheme; for wint2 it names the converter, because the search of
                2-bit codes takes some 400 times as long as rounding.
        """
        data = {"quantization": wanted} if isinstance(wanted, str) else wanted
        fields = JsonFields(data, "--quantization")
        if data.get("quantization") == "wint2":
            raise ConfigError(
                "--quantization wint2: this checkpoint is bf16, and 2-bit weights are searched "
                "beforehand: fastdeploy-lite quantize --model DIR --output NEW_DIR; loading itself "
                f"can make {', '.join(ONLINE_QUANTIZATION)}"
            )
        scheme = _scheme_name(fields, ONLINE_QUANTIZATION)
        _refuse_kv_cache_quantization(fields)
        return cls._from_integers(scheme, fields)

    @classmethod
    def _from_integers(cls, scheme: str, fields: JsonFields) -> QuantizationConfig:
        dense_default = "wint8" if scheme != "mix_quant" else None
        moe_default = scheme if scheme != "mix_quant" else None
        dense = fields.one_of("dense_quant_type", dense_default, formats.config_names())
        moe = fields.one_of("moe_quant_type", moe_default, formats.config_names())
        if not fields.boolean("is_permuted", True):
            fields.fail("is_permuted", False, "true (weights in Paddle's kernel layout)")
        return cls(scheme, dense, moe)

    @classmethod
    def _from_wint2(cls, fields: JsonFields) -> QuantizationConfig:
        moe = fields.section("moe_quant_config")
        # FastDeploy takes the key map from this inner name; the published file leaves it out.
        moe.one_of("quant_type", "w4w2", ("w4w2",))
        w4 = moe.section("moe_w4_quant_config")
        w2 = moe.section("moe_w2_quant_config")
        w4.one_of("quant_type", "wint4", ("wint4",))
        w2.one_of("quant_type", "wint2", ("wint2",))
        end = w4.integer("quant_end_layer", _DEFAULT_W4_END_LAYER, minimum=-1)
        return cls(
            "wint2",
            fields.one_of("dense_quant_type", "wint8", formats.config_names()),
            fields.one_of("moe_quant_type", "w4w2", ("w4w2",)),
            w4_start_layer=w4.integer("quant_start_layer", 0, minimum=-1),
            w4_end_layer=end,
            w2_start_layer=w2.integer("quant_start_layer", end + 1, minimum=-1),
            w2_end_layer=w2.integer("quant_end_layer", None, minimum=-1),
            row_order=_row_order(w2),
            w4_layers=_w4_layers(w4),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the object as FastDeploy's published models write it."""
        top: dict[str, Any] = {
            "dense_quant_type": self.dense_quant_type,
            "moe_quant_type": self.moe_quant_type,
            "quantization": self.quantization,
        }
        if self.quantization == "wint2":
            top["moe_quant_config"] = {
                "moe_w4_quant_config": {
                    "quant_type": "wint4",
                    "quant_granularity": "per_channel",
                    "quant_start_layer": self.w4_start_layer,
                    "quant_end_layer": self.w4_end_layer,
                    **({} if self.w4_layers is None else {"layers": list(self.w4_layers)}),
                },
                "moe_w2_quant_config": {
                    "quant_type": "wint2",
                    "quant_granularity": "pp_acc",
                    "quant_group_size": 64,
                    "quant_start_layer": self.w2_start_layer,
                    "quant_end_layer": self.w2_end_layer,
                    **({} if self.row_order is None else {"row_order": self.row_order}),
                },
            }
        return top

    @property
    def linear_kind(self) -> LinearKind:
        """Format of attention, dense MLP and shared-expert linears."""
        return formats.from_config_name(self.dense_quant_type).name

    def expert_kind(self, layer: int) -> WeightKind:
        """Format of the routed experts of decoder layer `layer` (0-based) as configured.

        A file is believed before this rule: `.super_scales` keys mean ccq on any layer.
        """
        if self.quantization == "wint2":
            if self.w4_layers is not None:
                return "int4" if layer in self.w4_layers else "ccq"
            return "int4" if layer <= self.w4_end_layer else "ccq"
        return formats.from_config_name(self.moe_quant_type).name


def _row_order(fields: JsonFields) -> RowOrder | None:
    if fields.data.get("row_order") is None:
        return None
    return cast(RowOrder, fields.one_of("row_order", None, ROW_ORDERS))


def _w4_layers(fields: JsonFields) -> tuple[int, ...] | None:
    layers = fields.data.get("layers")
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(type(i) is int and i >= 0 for i in layers):
        fields.fail("layers", layers, "a list of decoder layers, counted from 0")
    return tuple(layers)


def _scheme_name(fields: JsonFields, supported: tuple[str, ...]) -> str:
    name = fields.data.get("quantization")
    if name is None:
        fields.fail("quantization", name, f"the name of the scheme, such as {supported[0]!r}")
    known = ", ".join(supported)
    if name in _OTHER_QUANTIZATION:
        raise ConfigError(
            f"{fields.source}: quantization {quote(name)} is a FastDeploy scheme that this program"
            f" does not read; supported: {known}"
        )
    if name not in supported:
        raise ConfigError(
            f"{fields.source}: Invalid quantization method: {quote(name)}. "
            f"Available methods: {known}"
        )
    return str(name)


def _refuse_kv_cache_quantization(fields: JsonFields) -> None:
    value = fields.data.get("kv_cache_quant_type")
    if value not in (None, "", "none"):
        fields.fail("kv_cache_quant_type", value, "no such key (the KV cache is not quantised)")
