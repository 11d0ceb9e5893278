"""What a model family is: how it reads config.json, names its tensors and builds its model.

A family is chosen by `architectures` before anything else of config.json is understood. To add one,
write a folder like `models/ernie4_5` and name it in `_BUILT_IN`, or call `register_family`.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from fastdeploy_lite import formats
from fastdeploy_lite.models.linear import Linear
from fastdeploy_lite.quantization_config import LinearKind, QuantizationConfig, WeightKind
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.json_fields import JsonFields, read_json_object

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one decoder-only text model; fields are named as config.json keys.

    `num_hidden_layers` already excludes a removed tail (`removed_layers`). `quantization` says in
    which formats the weights are kept, None for bf16; `is_quantized` whether the files hold them so
    already. `raw` is the whole parsed config.json (not to be changed).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = False
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_use_aux_free: bool = False
    removed_layers: int = 0
    is_quantized: bool = False
    quantization: QuantizationConfig | None = None
    dtype: str = "bfloat16"
    bos_token_id: int = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 0
    source: str = "config.json"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dir(cls, path: str | Path, config_name: str = "config.json") -> ModelConfig:
        """Read `path/config_name`; raise ConfigError naming file, key, value and expectation."""
        file = Path(path) / config_name
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; is {path} a model folder?")
        return cls.from_dict(read_json_object(file), str(file))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Choose the family by `architectures`, and let it read the rest; ConfigError if none."""
        family = choose_family(data.get("architectures"), source)
        return family.read_config(JsonFields(data, source))

    @property
    def family(self) -> ModelFamily:
        """The family that read this configuration."""
        return choose_family(self.raw.get("architectures"), self.source)

    def with_quantization(self, wanted: str | Mapping[str, Any] | None) -> ModelConfig:
        """This model as `--quantization` wants it; the files' own quantisation wins.

        Raises:
            ConfigError: loading cannot do what is wanted (see `QuantizationConfig.online`).
        """
        if wanted is None or self.quantization is not None:
            return self
        return replace(self, quantization=QuantizationConfig.online(wanted))

    @property
    def quantizes_on_load(self) -> bool:
        """Whether the files are bf16 and their linears are quantised while they are read."""
        return self.quantization is not None and not self.is_quantized

    @property
    def layers_in_files(self) -> int:
        """Decoder layers that files may hold: those that run, and a tail that is not run."""
        return self.num_hidden_layers + self.removed_layers

    def describe_weights(self) -> str:
        """Formats for start-up lines, such as `int8 linears, int4 and ccq experts`."""
        layers = [i for i in range(self.num_hidden_layers) if self.is_moe_layer(i)]
        kinds = dict.fromkeys(self.expert_kind(layer) for layer in layers)
        experts = " and ".join(formats.get(kind).title for kind in kinds)
        text = f"{formats.get(self.linear_kind).title} linears"
        text += f", {experts} experts" if experts else ""
        return text + (", quantised while loading" if self.quantizes_on_load else "")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (0-based) has routed experts."""
        return self.moe_num_experts > 0 and layer >= self.moe_layer_start_index

    def expert_kind(self, layer: int) -> WeightKind:
        """Configured format of the routed experts of `layer`."""
        return "dense" if self.quantization is None else self.quantization.expert_kind(layer)

    @property
    def linear_kind(self) -> LinearKind:
        """Format of attention, dense MLP and shared-expert linears."""
        return "dense" if self.quantization is None else self.quantization.linear_kind

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the fused shared-expert MLP; 0 when there is none."""
        return self.moe_num_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is never quantised: its key and the shapes that files give it."""

    key: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Location:
    """Where a tensor lies in files of another spelling.

    Attributes:
        key: the name in the files.
        index: which matrix of a stack [E, ...], None for a tensor of its own.
        transposed: whether its last two axes are exchanged there.
    """

    key: str
    index: int | None = None
    transposed: bool = False


class ModelFamily(ABC):
    """One family of architectures; stateless. Names of tensors are this family's own spelling.

    Attributes:
        name: for messages.
        architectures: the names in config.json that it answers to.
        embedding_key, head_key: tables [V, H] and [H, V].
        model: `module:class` of the model, imported when it is to run.
        draft_model: the same of the layer that guesses a token ahead, "" where there is none.
    """

    name: str
    architectures: tuple[str, ...]
    embedding_key: str
    head_key: str
    model: str
    draft_model: str = ""

    @abstractmethod
    def read_config(self, fields: JsonFields) -> ModelConfig:
        """Check and convert the keys of config.json; ConfigError names what cannot be used."""

    @abstractmethod
    def linears(self, config: ModelConfig, size: int = 1, rank: int = 0) -> Iterator[Linear]:
        """Yield all linears in the order of the model, as `rank` of `size` has them."""

    def draft_linears(self, config: ModelConfig, size: int = 1, rank: int = 0) -> Iterator[Linear]:
        """Yield the linears of the layer that guesses a token ahead, as `rank` of `size` has them;
        none by default."""
        return iter(())

    @abstractmethod
    def plain_tensors(self, config: ModelConfig, vocab_size: int) -> Iterator[PlainTensor]:
        """Yield what is never quantised, the head too, for a table of `vocab_size` rows."""

    @abstractmethod
    def router_keys(self, config: ModelConfig, layer: int) -> tuple[str, str | None]:
        """Return the keys of a MoE layer's gate [H, E] and of its selection bias [E]."""

    @abstractmethod
    def expert_module(self, layer: int, expert: int, name: str) -> str:
        """Return the module of linear `name` of one routed expert."""

    @abstractmethod
    def layer_of(self, key: str) -> int | None:
        """Return the decoder layer that a tensor belongs to, None for all others."""

    def model_class(self) -> Any:
        """Return the class that runs the model; imports the framework."""
        return _imported(self.model)

    def draft_class(self) -> Any:
        """Return the class of `draft_model`, None without one; imports the framework."""
        return _imported(self.draft_model) if self.draft_model else None

    def locate(self, shapes: Mapping[str, Shape]) -> dict[str, Location] | None:
        """Return where each of this family's tensors lies, by the names and shapes in the files.

        None means that the files use the family's own spelling. Keys that mean nothing stay out.
        """
        return None

    def spelling(self, keys: Mapping[str, Shape]) -> str:
        """Return what the names in the files are called, for reports."""
        return self.name

    def convert_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return config.json for a folder that is written in the family's own spelling."""
        return dict(config.raw)


def _imported(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


_BUILT_IN = {
    "Ernie4_5_MoeForCausalLM": "fastdeploy_lite.models.ernie4_5",
    "Ernie4_5ForCausalLM": "fastdeploy_lite.models.ernie4_5",
}
"""Architecture -> module whose FAMILY reads it; imported when it is asked for."""
_registered: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily, *architectures: str) -> ModelFamily:
    """Let `family` answer to its own architectures and to those given; returns it."""
    for name in (*family.architectures, *architectures):
        _registered[name] = family
    return family


def known_architectures() -> list[str]:
    """Return the architecture names that some family reads."""
    return sorted({*_BUILT_IN, *_registered})


def choose_family(names: object, source: str) -> ModelFamily:
    """Return the family of the first known name; ConfigError naming what is known."""
    candidates = names if isinstance(names, list) else []
    for name in candidates:
        if not isinstance(name, str):
            continue
        if name in _registered:
            return _registered[name]
        if name in _BUILT_IN:
            family: ModelFamily = importlib.import_module(_BUILT_IN[name]).FAMILY
            return family
    found = "nothing" if names is None else quote(names)
    known = ", ".join(map(repr, known_architectures()))
    raise ConfigError(
        f"{source}: architectures: found {found}, expected a list with one of {known}"
    )
