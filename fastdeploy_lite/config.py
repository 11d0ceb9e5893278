"""How a model is run, and what generation_config.json says; `models.family` has config.json.

All classes are plain data, are checked when built, and know nothing of Paddle or of files
other than that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization_config import QuantizationConfig
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.files import is_there
from fastdeploy_lite.utils.json_fields import JsonFields, read_json_object

__all__ = [
    "BLOCK_SIZE",
    "ActivationBits",
    "CacheConfig",
    "EarlyStopConfig",
    "ExecutorBackend",
    "ExpertOffloadConfig",
    "FDConfig",
    "GenerationDefaults",
    "LoadChoice",
    "LoadConfig",
    "LogprobsMode",
    "ModelConfig",
    "ParallelConfig",
    "QuantizationConfig",
    "RuntimeConfig",
    "SchedulerConfig",
    "WantedOrder",
]

WantedOrder = Literal["auto", "natural", "permuted"]
ExecutorBackend = Literal["mp", "ray"]
LoadChoice = Literal["default", "default_v1", "dummy"]
ActivationBits = Literal[16, 24]
LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]

BLOCK_SIZE = 64  # tokens of one KV block; the attention kernels are compiled for it
# A step whose guesses outnumber this is bound by arithmetic on any device: checking more is a loss.
MOST_DRAFT_TOKENS = 256


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and stop ids of generation_config.json; None where the file is silent.

    `others` has the keys of the file that are no defaults here.
    """

    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dir(
        cls, path: str | Path, config_name: str = "generation_config.json"
    ) -> GenerationDefaults:
        """Read `path/config_name`; an absent file gives no defaults, an unreadable one raises."""
        file = Path(path) / config_name
        if not is_there(file):
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
            repetition_penalty=fields.number("repetition_penalty", None, minimum=1e-6),
            frequency_penalty=fields.number("frequency_penalty", None, minimum=-2.0, maximum=2.0),
            presence_penalty=fields.number("presence_penalty", None, minimum=-2.0, maximum=2.0),
            bos_token_id=fields.integer("bos_token_id", None),
            eos_token_id=fields.token_ids("eos_token_id", ()),
            pad_token_id=fields.integer("pad_token_id", None),
            others={name: value for name, value in data.items() if name not in cls.__annotations__},
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
    """Number of ranks, the rank of this process, and replicas that share this host's memory.

    `executor_backend`: mp puts ranks into processes of this host, ray into a Ray cluster.
    """

    tensor_parallel_size: int = 1
    rank: int = 0
    data_parallel_size: int = 1
    executor_backend: ExecutorBackend = "mp"

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            _refuse("tensor_parallel_size", self.tensor_parallel_size, "at least 1")
        if self.executor_backend not in get_args(ExecutorBackend):
            _refuse("distributed_executor_backend", self.executor_backend, "mp or ray")
        if not 0 <= self.rank < self.tensor_parallel_size:
            _refuse("rank", self.rank, f"in [0, {self.tensor_parallel_size})")


@dataclass(frozen=True)
class LoadConfig:
    """Where weights come from. `default` and `default_v1` read files, `dummy` makes them up.

    `row_order`: in which order 2-bit experts store their rows; auto asks the files.
    `lm_head_quantization`: wint8 makes an int8 head of the bf16 one, on the CPU.
    `packed_cache`: folder where weights for the CPU are kept as its kernels read them;
    `packed_cache_access`: whether they are copied from there, or mapped.
    """

    load_choices: LoadChoice = "default"
    row_order: WantedOrder = "auto"
    lm_head_quantization: Literal["wint8"] | None = None
    packed_cache: Path | None = None
    packed_cache_access: Literal["copy", "map"] = "copy"

    def __post_init__(self) -> None:
        if self.load_choices not in get_args(LoadChoice):
            _refuse("load_choices", self.load_choices, f"one of {', '.join(get_args(LoadChoice))}")
        if self.row_order not in get_args(WantedOrder):
            _refuse("wint2_row_order", self.row_order, f"one of {', '.join(get_args(WantedOrder))}")
        if self.lm_head_quantization not in (None, "wint8"):
            _refuse("lm_head_quantization", self.lm_head_quantization, "wint8")
        if self.packed_cache_access not in ("copy", "map"):
            _refuse("packed_cache_access", self.packed_cache_access, "copy or map")

    @property
    def head_kind(self) -> Literal["dense", "int8"]:
        """Format in which the output head is kept."""
        return "dense" if self.lm_head_quantization is None else "int8"


@dataclass(frozen=True)
class ExpertOffloadConfig:
    """Routed experts that stay in main memory, where the CPU computes them, beside a card.

    They are those of the first layers that have experts, by default of all.

    Attributes:
        cpu_layers: of so many layers.
        card_gib: of so few that the others' weigh at most so many GiB on the card.
    """

    cpu_layers: int | None = None
    card_gib: float | None = None

    def __post_init__(self) -> None:
        if self.cpu_layers is not None and self.card_gib is not None:
            raise ConfigError(
                "cpu_moe_layers and moe_card_gib both say how many experts stay in main memory: "
                "leave one of them out"
            )
        if self.cpu_layers is not None and self.cpu_layers < 1:
            _refuse("cpu_moe_layers", self.cpu_layers, "at least 1")
        if self.card_gib is not None and not self.card_gib >= 0:
            _refuse("moe_card_gib", self.card_gib, "at least 0")


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
    """Everything that the engine core and the model runner need; built once, shared read-only.

    `activation_bits`: of the integers that the CPU multiplies quantised weights by.
    """

    model_path: Path
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    expert_offload: ExpertOffloadConfig | None = None
    activation_bits: ActivationBits = 24
    device: str | None = None
    use_cudagraph: bool = True
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    seed: int = 0
    enable_logprob: bool = False
    logprobs_mode: LogprobsMode = "raw_logprobs"
    max_logprobs: int = 20
    tokenizer_path: Path | None = None
    early_stop: EarlyStopConfig | None = None
    speculative: SpeculativeConfig | None = None
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
        if self.activation_bits not in get_args(ActivationBits):
            _refuse("activation_bits", self.activation_bits, "16 or 24")
        ranks, replicas = self.parallel.tensor_parallel_size, self.parallel.data_parallel_size
        if self.expert_offload is not None and (ranks > 1 or replicas > 1):
            raise ConfigError(
                f"moe_device cpu is for one card, found tensor_parallel_size {ranks} and "
                f"data_parallel_size {replicas}: leave one or the other out"
            )

    # Upstream's names, for plug-ins that are handed an `FDConfig`.

    @property
    def model_config(self) -> ModelConfig:
        """The model's sizes."""
        return self.model

    @property
    def cache_config(self) -> CacheConfig:
        """Of the KV cache."""
        return self.cache

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """Limits of a step."""
        return self.scheduler

    @property
    def parallel_config(self) -> ParallelConfig:
        """Ranks."""
        return self.parallel

    @property
    def has_draft_model(self) -> bool:
        """Whether a layer of the model guesses tokens ahead."""
        return self.speculative is not None and self.speculative.method == "mtp"

    @property
    def num_kv_layers(self) -> int:
        """Layers with a KV cache: the model's, and the draft layer's."""
        return self.model.num_hidden_layers + self.has_draft_model

    @property
    def max_draft_tokens(self) -> int:
        """Most guessed tokens that a step checks, of all sequences together."""
        if self.speculative is None:
            return 0
        limits = self.scheduler
        wanted = min(limits.max_num_seqs * self.speculative.most_tokens, MOST_DRAFT_TOKENS)
        return max(0, min(wanted, limits.max_num_batched_tokens - limits.max_num_seqs))

    @property
    def max_logit_rows(self) -> int:
        """Most positions that a step samples."""
        return self.scheduler.max_num_seqs + self.max_draft_tokens


FDConfig = RuntimeConfig  # upstream's name, for annotations of plug-ins
