"""Every engine argument of FastDeploy: as `LLM(...)` keywords and as command-line flags.

Each field below is one flag; names, types and defaults are upstream's. A flag that has no meaning
on a single node is accepted and named once in a warning; only those that would change results
silently are refused.
"""

from __future__ import annotations

# ruff: noqa: RUF009 - `_flag` is `dataclasses.field` with metadata
import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.config import (
    CacheConfig,
    EarlyStopConfig,
    ExpertOffloadConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from fastdeploy_lite.plugins import MODELS, load_plugins
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.utils.argument_parser import NO_EFFECT, FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, VariableError, quote
from fastdeploy_lite.utils.logging import get_logger
from fastdeploy_lite.utils.typed_fields import check_types

QUANTIZATION_NAMES = (
    "wint2", "wint4", "wint8", "weight_only", "block_wise_fp8", "tensor_wise_fp8", "w4a8",
    "w4afp8", "w8a8", "wfp8afp8", "mix_quant", "kvcache",
)  # fmt: skip
GUIDED_BACKENDS = ("off", "auto", "xgrammar", "guidance")
MOST_REPLICAS = 64
DEFAULT_BATCHED_TOKENS = 8192  # upstream's, where prefill costs milliseconds
CPU_BATCHED_TOKENS = 1024  # a CPU prefills a chunk in seconds: larger ones stall every decode
_log = get_logger("console")


def _json(text: Any) -> Any:
    """Argparse type: a JSON object."""
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {quote(text)}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {quote(text)}")
    return value


def _quantization(text: Any) -> Any:
    """Argparse type: a name, or a JSON object."""
    if isinstance(text, str) and text.lstrip().startswith("{"):
        return _json(text)
    return text


_json.takes_mapping = _quantization.takes_mapping = True  # type: ignore[attr-defined]  # in YAML


def _text_or_none(text: str) -> str | None:
    return text or None


def _boolean(text: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if str(text).lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {quote(text)}")
    return words[str(text).lower()]


_Converter = Callable[[str], Any]


def _flag(default: Any, kind: _Converter | str, text: str, **extra: Any) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: Of the field and of the flag.
        kind: Converter of the flag's text, "flag" (present or absent), "switch" (`--[no-]name`) or
            "list" (one or more words).
        text: Help.
        **extra: `choices`, `aliases`, and `ignored=True` for a flag without effect here.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text, **extra})


def _ignored(default: Any, kind: _Converter | str, text: str, **extra: Any) -> Any:
    return _flag(default, kind, f"{text} (accepted, no effect)", ignored=True, **extra)


@dataclass
class EngineArgs:
    """Arguments of the engine; `LLM(**kwargs)` and the command line both end here.

    Raises:
        TypeError: An unknown name was passed.
        ConfigError: A value is out of range; see `create_runtime_config` too.
    """

    model: str = _flag("baidu/ernie-45-turbo", str, "model folder, repository id, or 'demo'")
    served_model_name: str | None = _flag(None, _text_or_none, "name that requests must use")
    revision: str | None = _flag("master", _text_or_none, "revision to download")
    model_config_name: str | None = _flag("config.json", _text_or_none, "name of config.json")
    tokenizer: str | None = _flag(None, _text_or_none, "tokenizer folder, default: the model's")
    tokenizer_base_url: str | None = _ignored(None, _text_or_none, "remote tokenizer service")
    max_model_len: int = _flag(2048, int, "limit of prompt and output together, tokens")
    max_num_seqs: int = _flag(8, int, "sequences that run at the same time, at most 256")
    max_num_batched_tokens: int | None = _flag(
        None, int, "tokens computed in one step, prefill chunks and decodes together"
    )
    block_size: int = _flag(64, int, "tokens of one KV block; 64 is the only value")
    gpu_memory_utilization: float = _flag(0.9, float, "share of memory for weights and KV cache")
    num_gpu_blocks_override: int | None = _flag(None, int, "number of KV blocks")
    enable_prefix_caching: bool = _flag(True, "switch", "reuse KV blocks of common prefixes")
    enable_output_caching: bool = _flag(True, "switch", "reuse KV blocks of generated tokens too")
    enable_chunked_prefill: bool | None = _flag(
        None, "switch", "prefill in chunks; default: unless FD_DISABLE_CHUNKED_PREFILL=1"
    )
    tensor_parallel_size: int = _flag(1, int, "ranks that share each layer", aliases=("-tp",))
    quantization: str | dict[str, Any] | None = _flag(
        None,
        _quantization,
        "quantise a bf16 checkpoint while loading: wint8, wint4 or JSON; a quantised one stays",
    )
    lm_head_quantization: str | None = _flag(
        None,
        _text_or_none,
        "keep the output head in another form, on the CPU: wint8 halves what it reads a token",
        choices=("wint8",),
    )
    activation_bits: int = _flag(
        24,
        int,
        "rounding of activations before quantised weights, on the CPU: 16 is faster, less exact",
        choices=(16, 24),
    )
    moe_device: str | None = _flag(
        None,
        _text_or_none,
        "where routed experts are: cpu keeps them in main memory beside a card; default: the card",
        choices=("cpu",),
    )
    cpu_moe_layers: int | None = _flag(
        None, int, "moe_device cpu for the first so many layers with experts alone"
    )
    moe_card_gib: float | None = _flag(
        None,
        float,
        "moe_device cpu for as few first layers as leave so many GiB of experts to the card",
    )
    load_choices: str = _flag(
        "default", str, "where weights come from", choices=("default", "default_v1", "dummy")
    )
    packed_cache: str | None = _flag(
        None,
        _text_or_none,
        "folder to keep weights in as the CPU reads them, gigabytes, for fast starts;"
        " default: FD_LITE_PACKED_CACHE",
    )
    packed_cache_access: str = _flag(
        "copy",
        str,
        "packed weights are copied into huge pages, or map: shared, for the fastest start",
        choices=("copy", "map"),
    )
    wint2_row_order: str | None = _flag(
        None,
        _text_or_none,
        "row order of 2-bit experts; default: FD_LITE_WINT2_ROW_ORDER, else auto, from the files",
        choices=("auto", "natural", "permuted"),
    )
    use_cudagraph: bool = _flag(
        True, "switch", "replay decode steps as CUDA graphs, on a CPU as calls"
    )
    graph_optimization_config: dict[str, Any] | None = _flag(
        None, _json, "JSON: use_cudagraph, graph_opt_level, cudagraph_capture_sizes"
    )
    speculative_config: dict[str, Any] | None = _flag(
        None, _json, "JSON: method (ngram, suffix, mtp, naive), num_speculative_tokens, ..."
    )
    guided_decoding_backend: str = _flag(
        "auto", str, "structured output; any value but off uses llguidance", choices=GUIDED_BACKENDS
    )
    guided_decoding_disable_any_whitespace: bool = _flag(
        False, _boolean, "JSON without free whitespace", nargs="?", const=True
    )
    reasoning_parser: str | None = _flag(None, str, "how to separate thinking from the answer")
    tool_call_parser: str | None = _flag(None, str, "how to find tool calls in the answer")
    tool_parser_plugin: str | None = _flag(None, str, "Python file that registers tool parsers")
    chat_template: str | None = _flag(None, str, "Jinja text or file that overrides the model's")
    enable_logprob: bool = _flag(False, "flag", "permit log-probabilities in requests")
    max_logprobs: int = _flag(20, int, "alternatives that a request may ask for; -1 is no limit")
    logprobs_mode: str = _flag(
        "raw_logprobs",
        str,
        "before (raw) or after (processed) penalties and temperature",
        choices=("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"),
    )
    seed: int = _flag(0, int, "seed of initialisation (dummy weights); not of requests")
    enable_early_stop: bool = _flag(False, "flag", "stop sequences that only repeat")
    early_stop_config: dict[str, Any] | None = _flag(
        None, _json, "JSON: enable_early_stop, strategy, window_size, threshold"
    )
    lm_head_fp32: bool = _ignored(False, "flag", "logits are float32 sums always")
    logits_processors: list[str] | None = _flag(
        None, "list", "class names, or module.path:Class, applied to logits"
    )
    data_parallel_size: int = _flag(1, int, "replicas of the model behind one port")
    distributed_executor_backend: str = _flag(
        "mp", str, "where ranks and replicas run: processes of this host, or a Ray cluster",
        choices=("mp", "ray"),
    )  # fmt: skip
    splitwise_role: str = _flag(
        "mixed", str, "only mixed is available", choices=("mixed", "prefill", "decode")
    )

    kv_cache_ratio: float = _ignored(0.75, float, "share of KV blocks for prefill")
    static_decode_blocks: int = _ignored(2, int, "blocks reserved for decoding")
    prealloc_dec_block_slot_num_threshold: int = _ignored(12, int, "decode preallocation")
    swap_space: float | None = _ignored(None, float, "GB of host memory for KV blocks")
    engine_worker_queue_port: Any = _ignored("0", str, "internal ports")
    cache_queue_port: Any = _ignored("0", str, "internal ports")
    local_data_parallel_id: int = _ignored(0, int, "number of this replica")
    enable_expert_parallel: bool = _ignored(False, "flag", "spread experts over ranks")
    disable_custom_all_reduce: bool = _ignored(False, "flag", "use plain NCCL")
    enable_flashinfer_allreduce_fusion: bool = _ignored(False, "flag", "communication tuning")
    use_internode_ll_two_stage: bool = _ignored(False, "flag", "communication tuning")
    disable_sequence_parallel_moe: bool = _ignored(False, "flag", "communication tuning")
    enable_chunked_moe: bool = _ignored(False, "flag", "MoE in chunks")
    chunked_moe_size: int = _ignored(256, int, "tokens of an MoE chunk")
    enable_eplb: bool = _ignored(False, "flag", "expert load balancing")
    eplb_config: dict[str, Any] | None = _ignored(None, _json, "expert load balancing")
    ips: Any = _ignored(None, str, "nodes of a cluster")
    max_num_partial_prefills: int = _ignored(1, int, "prefills in chunks at a time")
    max_long_partial_prefills: int = _ignored(1, int, "long prefills in chunks at a time")
    long_prefill_token_threshold: int = _ignored(0, int, "tokens that make a prefill long")
    dynamic_load_weight: bool = _ignored(False, "flag", "replace weights while running")
    load_strategy: str = _ignored(
        "normal", str, "weight transfer",
        choices=("normal", "ipc", "ipc_snapshot", "meta", "rsync"),
    )  # fmt: skip
    enable_mm: bool = _ignored(False, "flag", "deprecated: found from the checkpoint")
    limit_mm_per_prompt: dict[str, Any] | None = _ignored(None, _json, "images per prompt")
    mm_processor_kwargs: dict[str, Any] | None = _ignored(None, _json, "image processor")
    max_encoder_cache: int = _ignored(-1, int, "image encoder cache")
    max_processor_cache: float = _ignored(-1, float, "image processor cache")
    innode_prefill_ports: Any = _ignored(None, str, "disaggregation")
    pd_comm_port: Any = _ignored(None, str, "disaggregation")
    rdma_comm_ports: Any = _ignored(None, str, "disaggregation")
    cache_transfer_protocol: str = _ignored("ipc,rdma", str, "disaggregation")
    router: str | None = _ignored(None, str, "router of a disaggregated service")
    kvcache_storage_backend: str | None = _ignored(
        None, str, "KV storage", choices=("mooncake", "attention_store", "file")
    )
    write_policy: str | None = _ignored(None, str, "KV storage")
    scheduler_name: str = _ignored(
        "local", str, "request scheduler", choices=("local", "global", "splitwise", "dp")
    )
    scheduler_max_size: int = _ignored(-1, int, "length of the Redis queue")
    scheduler_ttl: int = _ignored(900, int, "Redis scheduler")
    scheduler_host: str = _ignored("127.0.0.1", str, "Redis scheduler")
    scheduler_port: int = _ignored(6379, int, "Redis scheduler")
    scheduler_db: int = _ignored(0, int, "Redis scheduler")
    scheduler_password: str | None = _ignored(None, str, "Redis scheduler")
    scheduler_topic: str = _ignored("default", str, "Redis scheduler")
    scheduler_min_load_score: float = _ignored(3, float, "Redis scheduler")
    scheduler_load_shards_num: int = _ignored(1, int, "Redis scheduler")
    scheduler_sync_period: int = _ignored(5, int, "Redis scheduler")
    scheduler_expire_period: int = _ignored(3000, int, "Redis scheduler")
    scheduler_release_load_expire_period: int = _ignored(600, int, "Redis scheduler")
    scheduler_reader_parallel: int = _ignored(4, int, "Redis scheduler")
    scheduler_writer_parallel: int = _ignored(4, int, "Redis scheduler")
    scheduler_reader_batch_size: int = _ignored(200, int, "Redis scheduler")
    scheduler_writer_batch_size: int = _ignored(200, int, "Redis scheduler")
    task: str = _ignored("generate", str, "kind of model")
    runner: str = _ignored("auto", str, "kind of model")
    convert: str = _ignored("auto", str, "kind of model")
    model_impl: str = _ignored(
        "auto", str, "model implementation", choices=("auto", "fastdeploy", "paddleformers")
    )
    override_pooler_config: dict[str, Any] | None = _ignored(None, _json, "pooling")
    use_warmup: int = _ignored(0, int, "warm-up before serving")
    plas_attention_config: dict[str, Any] | None = _ignored(None, _json, "sparse attention")
    enable_overlap_schedule: bool = _ignored(False, "switch", "overlap scheduling with compute")
    enable_keep_sampling_mask: bool = _ignored(False, "flag", "reinforcement learning")
    enable_entropy: bool = _ignored(False, "flag", "reinforcement learning")
    shutdown_comm_group_if_worker_idle: bool = _ignored(False, "switch", "weight updates")
    rsync_config: dict[str, Any] | None = _ignored(None, _json, "weight updates")
    routing_replay_config: dict[str, Any] | None = _ignored(None, _json, "reinforcement learning")

    def __post_init__(self) -> None:
        if isinstance(self.quantization, str):
            self.quantization = _as_argument(_quantization, "quantization", self.quantization)
        for name in _JSON_FIELDS:
            setattr(self, name, _as_argument(_json, name, getattr(self, name)))
        check_types(self)
        self._check_quantization()
        self._check_choices()
        self._merge_graph_config()
        self._merge_early_stop()
        self._speculative_config()
        self._refuse_what_would_change_results()

    # From and to the command line ----------------------------------------------------------------

    @classmethod
    def add_cli_args(cls, parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        """Add every engine flag to `parser`.

        Args:
            parser: Accepts both spellings of each flag.

        Returns:
            `parser`.
        """
        group = parser.add_argument_group("engine")
        unused = parser.add_argument_group(NO_EFFECT)
        for field in dataclasses.fields(cls):
            _add_flag(unused if field.metadata.get("ignored") else group, field)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Take the engine's fields out of parsed arguments; others are left alone."""
        names = (f.name for f in dataclasses.fields(cls))
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; `EngineArgs(**that)` is equal to this one."""
        return dataclasses.asdict(self)

    def shown(self) -> dict[str, Any]:
        """The fields for logs and reports: passwords, and those inside of URLs, are masked."""
        return {name: _masked(name, value) for name, value in self.to_dict().items()}

    # Checks --------------------------------------------------------------------------------------

    @property
    def _quantization_name(self) -> Any:
        wanted = self.quantization
        return wanted.get("quantization") if isinstance(wanted, dict) else wanted

    def _check_quantization(self) -> None:
        name = self._quantization_name
        if self.quantization is not None and name is None:
            raise ConfigError("quantization: the JSON object needs the key 'quantization'")
        if name is not None and name not in QUANTIZATION_NAMES:
            raise ConfigError(
                f"Invalid quantization method: {quote(name)}. "
                f"Available methods: {', '.join(QUANTIZATION_NAMES)}"
            )

    def _check_choices(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            value = getattr(self, field.name)
            if choices and value is not None and value not in choices:
                allowed = ", ".join(map(str, choices))
                raise ConfigError(f"{field.name} must be one of {allowed}, got {quote(value)}")
        if not 0.0 <= self.kv_cache_ratio <= 1.0:
            raise ConfigError(f"kv_cache_ratio must be in [0, 1], got {self.kv_cache_ratio}")
        if not 1 <= self.max_long_partial_prefills <= self.max_num_partial_prefills:
            raise ConfigError(
                "max_num_partial_prefills must be at least max_long_partial_prefills, and that at "
                f"least 1, got {self.max_num_partial_prefills} and {self.max_long_partial_prefills}"
            )
        if envs.FD_DISABLED_RECOVER:
            raise VariableError("FD_DISABLED_RECOVER=1 is not available: unset it")

    def _merge_graph_config(self) -> None:
        config = self.graph_optimization_config or {}
        use = config.get("use_cudagraph", self.use_cudagraph)
        level = config.get("graph_opt_level", 0)
        sizes = config.get("cudagraph_capture_sizes")
        if not isinstance(use, bool):
            raise ConfigError(f"use_cudagraph must be true or false, got {quote(use)}")
        if level not in (0, 1, 2) or isinstance(level, bool):
            raise ConfigError(f"graph_opt_level must be 0, 1 or 2, got {quote(level)}")
        if sizes is not None and not _positive_ints(sizes):
            raise ConfigError(
                f"cudagraph_capture_sizes must be a non-empty list of sizes, got {quote(sizes)}"
            )
        self.use_cudagraph = use

    def _merge_early_stop(self) -> None:
        config = self.early_stop_config
        if config is None:
            return
        enable = config.get("enable_early_stop", self.enable_early_stop)
        if not isinstance(enable, bool):
            raise ConfigError(f"enable_early_stop must be true or false, got {quote(enable)}")
        if self.enable_early_stop and not enable:
            raise ConfigError("enable_early_stop is set, but early_stop_config says false")
        self.enable_early_stop = enable
        unknown = set(config) - {"enable_early_stop", "strategy", "window_size", "threshold"}
        if unknown:
            raise ConfigError(f"early_stop_config: unknown keys {', '.join(sorted(unknown))}")

    def _refuse_what_would_change_results(self) -> None:
        if self.splitwise_role != "mixed":
            raise ConfigError(
                f"splitwise_role {self.splitwise_role!r} is not available: one node does both, "
                "use mixed"
            )
        if not 1 <= self.data_parallel_size <= MOST_REPLICAS:
            raise ConfigError(
                f"data_parallel_size must be 1 to {MOST_REPLICAS}, got {self.data_parallel_size}"
            )

    # Result --------------------------------------------------------------------------------------

    def create_runtime_config(self, *, quiet: bool = False) -> RuntimeConfig:
        """Resolve the model, check everything and build the engine's configuration.

        Args:
            quiet: Do not warn about ignored flags (a second process reads the same arguments).

        Returns:
            The configuration.

        Raises:
            ConfigError: A value is out of range, or values contradict each other.
            CheckpointError: The model's files cannot be used.
        """
        load_plugins(MODELS)  # a model of theirs may say how config.json is read
        folder = _resolve(self.model, self.revision)
        model = ModelConfig.from_dir(folder, self.model_config_name or "config.json")
        model = model.with_quantization(self.quantization)
        if not quiet:
            self._warn(model)
        scheduler = self._scheduler_config(model, quiet)
        return RuntimeConfig(
            model_path=folder,
            model=model,
            cache=self._cache_config(scheduler),
            scheduler=scheduler,
            parallel=ParallelConfig(
                self.tensor_parallel_size,
                data_parallel_size=self.data_parallel_size,
                executor_backend=self.distributed_executor_backend,  # type: ignore[arg-type]  # checked
            ),
            load=self._load_config(),
            expert_offload=self._expert_offload(),
            activation_bits=self.activation_bits,  # type: ignore[arg-type]  # checked
            use_cudagraph=self.use_cudagraph,
            cudagraph_capture_sizes=self._capture_sizes(),
            seed=self.seed,
            enable_logprob=self.enable_logprob,
            logprobs_mode=self.logprobs_mode,  # type: ignore[arg-type]  # checked there
            max_logprobs=self.max_logprobs,
            tokenizer_path=self._tokenizer_path(folder),
            early_stop=self._early_stop_config(),
            speculative=self._speculative_config(),
            guided_decoding_backend=self.guided_decoding_backend,
            guided_any_whitespace=not self.guided_decoding_disable_any_whitespace,
            reasoning_parser=self.reasoning_parser,
            chat_template=self.chat_template,
            logits_processors=tuple(self.logits_processors or ()),
        )

    def _load_config(self) -> LoadConfig:
        row_order = self.wint2_row_order or envs.FD_LITE_WINT2_ROW_ORDER or "auto"
        head = self.lm_head_quantization
        folder = self.packed_cache or envs.FD_LITE_PACKED_CACHE
        packed = Path(folder).expanduser().absolute() if folder else None
        access = self.packed_cache_access
        return LoadConfig(self.load_choices, row_order, head, packed, access)  # type: ignore[arg-type]  # checked there

    def _has_weights_to_pack(self) -> bool:
        return self._uses_cpu() and self.load_choices != "dummy"

    def _uses_cpu(self) -> bool:
        """Whether the CPU computes with weights."""
        return self._expert_offload() is not None or _on_cpu()

    def _expert_offload(self) -> ExpertOffloadConfig | None:
        config = ExpertOffloadConfig(self.cpu_moe_layers, self.moe_card_gib)
        is_wanted = self.moe_device is not None or config != ExpertOffloadConfig()
        return config if is_wanted else None

    def _scheduler_config(self, model: ModelConfig, quiet: bool) -> SchedulerConfig:
        length = min(self.max_model_len, model.max_position_embeddings)
        is_chosen = self.max_model_len != EngineArgs.max_model_len
        if length < self.max_model_len and is_chosen and not quiet:
            _log.warning(
                "max_model_len %d is beyond the model's max_position_embeddings: using %d",
                self.max_model_len,
                length,
            )
        most = self.max_num_seqs * length
        tokens = self.max_num_batched_tokens
        if tokens is None:
            tokens = CPU_BATCHED_TOKENS if self._uses_cpu() else DEFAULT_BATCHED_TOKENS
            tokens = max(min(tokens, most), self.max_num_seqs)
        elif length == self.max_model_len and tokens > most:
            raise ConfigError(
                f"max_num_batched_tokens must be at most max_num_seqs * max_model_len = {most}, "
                f"got {tokens}"
            )
        chunked = self.enable_chunked_prefill
        if chunked is None:
            chunked = not envs.FD_DISABLE_CHUNKED_PREFILL
        if not chunked and self.max_num_batched_tokens is None:
            tokens = max(tokens, length)
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=min(tokens, max(most, self.max_num_seqs)),
            max_model_len=length,
            enable_chunked_prefill=chunked,
        )

    def _cache_config(self, scheduler: SchedulerConfig) -> CacheConfig:
        blocks = self.num_gpu_blocks_override
        if blocks is not None:
            check_block_count(blocks, scheduler.max_model_len, self.block_size)
        if self.gpu_memory_utilization >= 0.95:
            _log.warning(
                "gpu_memory_utilization %.2f leaves little room: out-of-memory errors are likely",
                self.gpu_memory_utilization,
            )
        return CacheConfig(
            block_size=self.block_size,
            num_blocks=blocks,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_output_caching=self.enable_output_caching,
        )

    def _capture_sizes(self) -> tuple[int, ...] | None:
        sizes = (self.graph_optimization_config or {}).get("cudagraph_capture_sizes")
        return None if sizes is None else tuple(sorted(set(sizes)))

    def _speculative_config(self) -> SpeculativeConfig | None:
        given = {k: v for k, v in (self.speculative_config or {}).items() if v is not None}
        return SpeculativeConfig.from_mapping(given) if given else None

    def _early_stop_config(self) -> EarlyStopConfig | None:
        given = {k: v for k, v in (self.early_stop_config or {}).items() if v is not None}
        given.pop("enable_early_stop", None)
        config = EarlyStopConfig(**given)  # checked also where it is off
        return config if self.enable_early_stop else None

    def _tokenizer_path(self, model_folder: Path) -> Path:
        if self.tokenizer is None or self.tokenizer == self.model:
            return model_folder
        return _resolve(self.tokenizer, self.revision)

    def _warn(self, model: ModelConfig) -> None:
        for field in dataclasses.fields(self):
            if field.metadata.get("ignored") and getattr(self, field.name) != field.default:
                _warn_once(f"--{_flag_name(field.name)} has no effect here: ignored")
        if self._expert_offload() is not None and _on_cpu():
            _warn_once("moe_device has no effect here: everything is in main memory")
        if self.packed_cache and not self._has_weights_to_pack():
            _warn_once("packed_cache has no effect here: it is for weights of files in main memory")
        if self.activation_bits != EngineArgs.activation_bits and not self._uses_cpu():
            _warn_once("activation_bits has no effect here: a card takes activations as bfloat16")
        graph = self.graph_optimization_config or {}
        unknown = sorted(set(graph) - set(_GRAPH_KEYS))
        if unknown:
            _warn_once(f"graph_optimization_config: {', '.join(unknown)} has no effect here")
        if self.early_stop_config and not self.enable_early_stop:
            _warn_once("early_stop_config has no effect without enable_early_stop: ignored")
        if graph.get("graph_opt_level"):
            _warn_once("graph_optimization_config: graph_opt_level has no effect here")
        if isinstance(self.quantization, dict) and len(self.quantization) > 1:
            others = sorted(set(self.quantization) - {"quantization"})
            _warn_once(f"quantization: {', '.join(map(str, others))} has no effect here")
        wanted = self._quantization_name
        own = model.quantization.quantization if model.quantization else None
        if model.is_quantized and wanted not in (None, own):
            _warn_once(f"--quantization {wanted} is ignored: this checkpoint is {own} already")


def check_block_count(num_blocks: int, max_model_len: int, block_size: int) -> None:
    """Refuse a KV cache that cannot hold one sequence of full length.

    Args:
        num_blocks: Blocks of the cache.
        max_model_len: Tokens of the longest sequence.
        block_size: Tokens of one block.

    Raises:
        ConfigError: There are too few.
    """
    reserve = int(envs.FD_ENC_DEC_BLOCK_NUM)
    least = -(-max_model_len // block_size) + reserve
    if num_blocks < least:
        raise ConfigError(
            f"The KV cache has {num_blocks} blocks, but one sequence of max_model_len "
            f"{max_model_len} needs {least}: use a smaller max_model_len, a larger "
            "num_gpu_blocks_override or gpu_memory_utilization, or a device with more memory"
        )


_SECRET = re.compile(r"passw|secret|token$|api_?key|credential", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+@")
_GRAPH_KEYS = ("use_cudagraph", "graph_opt_level", "cudagraph_capture_sizes")


def _masked(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(name, inner) for inner in value]
    if value is not None and _SECRET.search(name):
        return "***"
    return _USER_OF_URL.sub("***@", value) if isinstance(value, str) else value


_JSON_FIELDS = tuple(
    f.name for f in dataclasses.fields(EngineArgs) if f.metadata.get("kind") is _json
)
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


def _flag_name(field_name: str) -> str:
    return field_name.replace("_", "-")


def _resolve(model: str, revision: str | None) -> Path:
    from fastdeploy_lite.checkpoint.hub import resolve_model  # noqa: PLC0415 - not for parsing

    return resolve_model(model, revision)


def _on_cpu() -> bool:
    from fastdeploy_lite import device  # noqa: PLC0415 - looks at the machine: only when asked

    return not device.decide().is_cuda


def _positive_ints(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(v) is int and v > 0 for v in value)


def _as_argument(convert: Callable[[Any], Any], name: str, value: Any) -> Any:
    """Apply an argparse converter to a keyword argument."""
    if value is None:
        return None
    try:
        converted = convert(value)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{name}: {error}") from None
    if convert is _json and not isinstance(converted, Mapping):
        raise ConfigError(f"{name}: expected a dict, got {quote(value)}")
    return converted


def _add_flag(group: Any, field: dataclasses.Field[Any]) -> None:
    meta = field.metadata
    names = [f"--{_flag_name(field.name)}", *meta.get("aliases", ())]
    options: dict[str, Any] = {"dest": field.name, "default": field.default, "help": meta["help"]}
    kind = meta["kind"]
    if kind == "flag":
        options["action"] = "store_true"
    elif kind == "switch":
        options["action"] = argparse.BooleanOptionalAction
    elif kind == "list":
        options["nargs"] = "+"
    else:
        options["type"] = kind
        options.update({k: meta[k] for k in ("choices", "nargs", "const") if k in meta})
    group.add_argument(*names, **options)
