"""What a model is (config.json, generation_config.json) and how to run it.

Keys, defaults and rules of config.json follow FastDeploy's reader; docs/checkpoint_format.md lists
them. All classes are plain data, are checked when built, and know nothing of Paddle or of files
other than the two JSON ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

from fastdeploy_lite import formats
from fastdeploy_lite.quantization_config import LinearKind, QuantizationConfig, WeightKind
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.json_fields import JsonFields, read_json_object

LoadChoice = Literal["default", "default_v1", "dummy"]
LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]

ARCHITECTURE = "Ernie4_5_MoeForCausalLM"
BLOCK_SIZE = 64  # tokens of one KV block; the attention kernels are compiled for it

# Bounds on what a configuration may ask for, far above any model: they keep a damaged file from
# turning into hours of work or a failed allocation.
_MOST_LAYERS, _MOST_EXPERTS, _LARGEST_SIZE = 2048, 4096, 1 << 24


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one ERNIE-4.5 (MoE) text model; fields are named as config.json keys.

    `num_hidden_layers` already excludes a removed tail. `quantization` says in which formats the
    weights are kept, None for bf16; `is_quantized` whether the files hold them so already. `raw` is
    the whole parsed config.json (not to be changed).
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
    is_quantized: bool = False
    quantization: QuantizationConfig | None = None
    dtype: str = "bfloat16"
    bos_token_id: int = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 0
    torch_format_hint: bool = False
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
        """Check and convert the keys of config.json; `source` names it in errors."""
        fields = JsonFields(data, source)
        _check_architecture(fields)
        _check_semantics(fields)
        quantization = _quantization(fields)
        hidden = fields.integer("hidden_size", minimum=1, maximum=_LARGEST_SIZE)
        return cls(
            hidden_size=hidden,
            num_hidden_layers=_layers_without_tail(fields),
            **_attention_fields(fields, hidden),
            intermediate_size=fields.integer("intermediate_size", minimum=1, maximum=_LARGEST_SIZE),
            vocab_size=fields.integer("vocab_size", minimum=1, maximum=_LARGEST_SIZE),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5, minimum=0.0, maximum=1.0),
            rope_theta=fields.number("rope_theta", 10000.0, minimum=1.0),
            max_position_embeddings=fields.integer("max_position_embeddings", 512, minimum=1),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            **_moe_fields(fields),
            is_quantized=quantization is not None,
            quantization=quantization,
            dtype=_weight_dtype(fields),
            bos_token_id=_id_or(fields, "bos_token_id", 1),
            eos_token_id=fields.token_ids("eos_token_id", (2,)),
            pad_token_id=_id_or(fields, "pad_token_id", 0),
            torch_format_hint="torch_dtype" in data and "dtype" not in data,
            source=source,
            raw=dict(data),
        )

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


def _id_or(fields: JsonFields, key: str, default: int) -> int:
    value: int | None = fields.integer(key, None)
    return default if value is None else value


def _check_architecture(fields: JsonFields) -> None:
    names = fields.data.get("architectures")
    if not isinstance(names, list) or ARCHITECTURE not in names:
        fields.fail("architectures", names, f"a list with {ARCHITECTURE!r}")
    experts = fields.data.get("moe_num_experts")
    if isinstance(experts, list):
        raise ConfigError(
            f"{fields.source}: moe_num_experts: found {quote(experts)}: a list of expert counts"
            " means a multimodal model, which is not supported; use a text-only model"
        )


# Keys whose other values change the arithmetic; a model that has them would run and be wrong.
_ONLY_VALUES: dict[str, tuple[object, ...]] = {
    "compression_ratio": (1.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}


def _check_semantics(fields: JsonFields) -> None:
    if fields.data.get("hidden_act", "silu") != "silu":
        fields.fail("hidden_act", fields.data["hidden_act"], "'silu'")
    for key, allowed in _ONLY_VALUES.items():
        value = fields.data.get(key)
        if isinstance(value, bool) or value not in allowed:
            fields.fail(key, value, f"{allowed[0]!r} (nothing else is implemented)")


def _weight_dtype(fields: JsonFields) -> str:
    key = "torch_dtype" if "dtype" not in fields.data and "torch_dtype" in fields.data else "dtype"
    return fields.one_of(key, "bfloat16", ("bfloat16", "float32"))


def _quantization(fields: JsonFields) -> QuantizationConfig | None:
    data = fields.data.get("quantization_config")
    is_quantized = fields.boolean("is_quantized", False)
    if data is None:
        if is_quantized:
            fields.fail("quantization_config", None, "an object, because is_quantized is true")
        return None
    if not isinstance(data, Mapping):
        fields.fail("quantization_config", data, "an object")
    # FastDeploy's rule: a config object alone marks quantised files, unless it only speaks of the
    # KV cache, which from_dict refuses.
    return QuantizationConfig.from_dict(data, fields.source)


def _layers_without_tail(fields: JsonFields) -> int:
    layers = cast(int, fields.integer("num_hidden_layers", minimum=1, maximum=_MOST_LAYERS))
    tail = fields.data.get("remove_tail_layer", False)
    removed = int(tail) if isinstance(tail, bool) else tail
    if removed is None:
        removed = 0
    if not isinstance(removed, int) or not 0 <= removed < layers:
        fields.fail("remove_tail_layer", tail, f"a boolean or an integer in [0, {layers - 1}]")
    return layers - removed


def _attention_fields(fields: JsonFields, hidden: int) -> dict[str, Any]:
    heads = fields.integer("num_attention_heads", minimum=1, maximum=_LARGEST_SIZE)
    kv_heads = fields.integer("num_key_value_heads", -1, minimum=-1, maximum=heads)
    if kv_heads == -1:  # FastDeploy's default: every query head has its own
        kv_heads = heads
    if kv_heads == 0 or heads % kv_heads:
        fields.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", None, minimum=2, maximum=_LARGEST_SIZE)
    head_dim = hidden // heads if head_dim is None else head_dim
    if head_dim < 2 or head_dim % 2:
        fields.fail("head_dim", head_dim, "an even number (RoPE turns pairs of features)")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def _moe_fields(fields: JsonFields) -> dict[str, Any]:
    experts = fields.integer("moe_num_experts", None, minimum=0, maximum=_MOST_EXPERTS)
    if not experts:
        return {}
    top_k_key = "moe_topk" if "moe_k" not in fields.data and "moe_topk" in fields.data else "moe_k"
    start = fields.data.get("moe_layer_start_index", 0)
    if isinstance(start, list):
        fields.fail("moe_layer_start_index", start, "an integer (a list means a multimodal model)")
    return {
        "moe_num_experts": experts,
        "moe_k": fields.integer(top_k_key, min(8, experts), minimum=1, maximum=experts),
        "moe_intermediate_size": fields.integer(
            "moe_intermediate_size", minimum=1, maximum=_LARGEST_SIZE
        ),
        "moe_num_shared_experts": fields.integer("moe_num_shared_experts", 0, maximum=1024),
        "moe_layer_start_index": fields.integer("moe_layer_start_index", 0),
        "moe_use_aux_free": fields.boolean("moe_use_aux_free", False),
    }


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and stop ids of generation_config.json; None where the file is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_dir(
        cls, path: str | Path, config_name: str = "generation_config.json"
    ) -> GenerationDefaults:
        """Read `path/config_name`; an absent file gives no defaults, an unreadable one raises."""
        file = Path(path) / config_name
        if not file.exists():
            return cls()
        return cls.from_dict(read_json_object(file), str(file))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], source: str = "generation_config.json"
    ) -> GenerationDefaults:
        """Check and convert the keys; ranges are those of SamplingParams."""
        fields = JsonFields(data, source)
        return cls(
            temperature=fields.number("temperature", None, minimum=0.0),
            top_p=fields.number("top_p", None, minimum=0.0, maximum=1.0),
            top_k=fields.integer("top_k", None, minimum=-1),
            min_p=fields.number("min_p", None, minimum=0.0, maximum=1.0),
            repetition_penalty=fields.number("repetition_penalty", None, minimum=1e-6),
            frequency_penalty=fields.number("frequency_penalty", None, minimum=-2.0, maximum=2.0),
            presence_penalty=fields.number("presence_penalty", None, minimum=-2.0, maximum=2.0),
            bos_token_id=fields.integer("bos_token_id", None),
            eos_token_id=fields.token_ids("eos_token_id", ()),
            pad_token_id=fields.integer("pad_token_id", None),
        )


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ConfigError(f"{name} must be {expected}, got {quote(value)}")


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache. `num_blocks` None: as many as `gpu_memory_utilization` leaves room for.

    On the CPU the same fraction is taken of the memory that is available after loading.
    """

    block_size: int = BLOCK_SIZE
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_output_caching: bool = True
    kv_cache_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.block_size != BLOCK_SIZE:
            _refuse("block_size", self.block_size, f"{BLOCK_SIZE} (tokens)")
        if self.num_blocks is not None and self.num_blocks < 1:
            _refuse("num_gpu_blocks_override", self.num_blocks, "at least 1")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            _refuse("gpu_memory_utilization", self.gpu_memory_utilization, "in (0, 1]")


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one engine step and of one sequence; all counts are tokens or sequences."""

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 8192
    max_model_len: int = 2048
    enable_chunked_prefill: bool = True
    max_waiting_requests: int = 4096

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= 256:
            _refuse("max_num_seqs", self.max_num_seqs, "between 1 and 256")
        if self.max_model_len < 16:
            _refuse("max_model_len", self.max_model_len, "at least 16")
        least = BLOCK_SIZE if self.enable_chunked_prefill else self.max_model_len
        least = max(self.max_num_seqs, min(least, self.max_num_seqs * self.max_model_len))
        if self.max_num_batched_tokens < least:
            _refuse("max_num_batched_tokens", self.max_num_batched_tokens, f"at least {least}")


@dataclass(frozen=True)
class ParallelConfig:
    """Tensor parallelism: number of ranks and the rank of this process."""

    tensor_parallel_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            _refuse("tensor_parallel_size", self.tensor_parallel_size, "at least 1")
        if not 0 <= self.rank < self.tensor_parallel_size:
            _refuse("rank", self.rank, f"in [0, {self.tensor_parallel_size})")


@dataclass(frozen=True)
class LoadConfig:
    """Where weights come from. `default` and `default_v1` read files, `dummy` makes them up."""

    load_choices: LoadChoice = "default"

    def __post_init__(self) -> None:
        if self.load_choices not in get_args(LoadChoice):
            _refuse("load_choices", self.load_choices, f"one of {', '.join(get_args(LoadChoice))}")


@dataclass(frozen=True)
class EarlyStopConfig:
    """End a sequence once every token of a window was sampled with near certainty (repetition).

    Attributes:
        strategy: only "repetition".
        window_size: tokens looked at.
        threshold: probability that all of them must exceed.
    """

    strategy: str = "repetition"
    window_size: int = 3000
    threshold: float = 0.99

    def __post_init__(self) -> None:
        if self.strategy != "repetition":
            _refuse("early_stop_config.strategy", self.strategy, "'repetition'")
        if type(self.window_size) is not int or self.window_size < 1:
            _refuse("early_stop_config.window_size", self.window_size, "an integer above 0")
        if type(self.threshold) not in (int, float) or not 0.0 <= self.threshold <= 1.0:
            _refuse("early_stop_config.threshold", self.threshold, "a number in [0, 1]")


@dataclass(frozen=True)
class RuntimeConfig:
    """Everything that the engine core and the model runner need; built once, shared read-only."""

    model_path: Path
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    device: str | None = None
    use_cudagraph: bool = True
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    seed: int = 0
    enable_logprob: bool = False
    logprobs_mode: LogprobsMode = "raw_logprobs"
    max_logprobs: int = 20
    lm_head_fp32: bool = False
    tokenizer_path: Path | None = None
    early_stop: EarlyStopConfig | None = None
    guided_decoding_backend: str = "off"
    guided_any_whitespace: bool = True
    reasoning_parser: str | None = None
    chat_template: str | None = None
    logits_processors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.logprobs_mode not in get_args(LogprobsMode):
            _refuse("logprobs_mode", self.logprobs_mode, f"one of {get_args(LogprobsMode)}")
        if self.max_logprobs < -1:
            _refuse("max_logprobs", self.max_logprobs, "at least -1 (no limit)")
