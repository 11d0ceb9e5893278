#!/usr/bin/env python3
"""This engine and llama.cpp side by side on the CPU: one shape, random weights, rounds in turn.

    pip install gguf && pip download --no-deps --no-binary :all: llama-cpp-python
    tar xzf llama_cpp_python-*.tar.gz && cd llama_cpp_python-*/vendor/llama.cpp
    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF
    cmake --build build -j --target llama-bench

    python entrypoints/bench_peers.py --llama-bench build/bin/llama-bench --gguf peer.gguf \\
        [--type Q2_K] [--layers 28] [--threads 2] [--rounds 3] [--prefill 512] [--decode 48] \\
        [--dense wint8|wint4] [--head wint8|bf16] [--activation-bits 24|16]

The GGUF is written where none is: ERNIE-4.5-21B-A3B's widths, routed experts in --type (Q2_K,
IQ2_XXS, ...), all other matrices and the embedding, which is the head too, in Q8_0. Ours has 2-bit
experts, and for the rest and the head int8 or what --dense and --head say. Blocks are random bytes
with small scales, so that texts mean nothing and speeds do. Fewer layers give smaller models whose
layers cost the same.

Both engines take one prompt of --prefill tokens, then --decode tokens one by one, in every round;
each stays idle while the other works. What is printed are medians with the least and the greatest,
and the ratios of each round's pair. Built with gcc 12.2, llama.cpp's AMX code crashes, because
stores before `_tile_loadconfig` are dropped: a memory barrier before it helps, as does clang.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_card import COMMON, SHAPES, Sequences, UniformRouting

from fastdeploy_lite import _ops_cpu, processor
from fastdeploy_lite.benchmarks.ceilings import read_bandwidth
from fastdeploy_lite.config import (
    BLOCK_SIZE,
    CacheConfig,
    LoadConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from fastdeploy_lite.utils.host_memory import keep_what_is_loaded

SHAPE = SHAPES["21b"]
ARCHITECTURE = "ernie4_5-moe"
READ_BYTES = 512 << 20

# Where a block's float16 scales stand, in bytes: all else may be any bits.
SCALES_AT = {"Q2_K": (80, 82), "IQ2_XXS": (0,), "IQ2_XS": (0,), "Q4_0": (0,), "Q8_0": (0,)}
SCALE = np.float16(2.0**-9)


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one round."""

    prefill: float
    decode: float


# -- the peer's model ------------------------------------------------------------------------------


def random_blocks(
    kind: str, shape: tuple[int, ...], random: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Bytes of a tensor of `shape` (rows last) in the GGML type `kind`, [..., bytes of a row]."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), np.uint8)
    for at in SCALES_AT[kind]:
        blocks[..., at : at + 2] = np.frombuffer(SCALE.tobytes(), np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def peer_tensors(layers: int, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape (rows last) and type of all tensors, as llama.cpp names them."""
    hidden, inner, experts = (
        SHAPE[k] for k in ("hidden_size", "moe_intermediate_size", "moe_num_experts")
    )
    shared, wide = inner * SHAPE["moe_num_shared_experts"], SHAPE["intermediate_size"]
    heads, kv_heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    head = COMMON["head_dim"]
    yield "token_embd.weight", (COMMON["vocab_size"], hidden), "Q8_0"
    yield "output_norm.weight", (hidden,), "F32"
    for layer in range(layers):
        prefix = f"blk.{layer}."
        yield f"{prefix}attn_norm.weight", (hidden,), "F32"
        yield f"{prefix}ffn_norm.weight", (hidden,), "F32"
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{prefix}attn_{name}.weight", (count * head, hidden), "Q8_0"
        yield f"{prefix}attn_output.weight", (hidden, heads * head), "Q8_0"
        routed = layer >= SHAPE["moe_layer_start_index"]
        width, tail = (shared, "_shexp") if routed else (wide, "")
        yield f"{prefix}ffn_gate{tail}.weight", (width, hidden), "Q8_0"
        yield f"{prefix}ffn_up{tail}.weight", (width, hidden), "Q8_0"
        yield f"{prefix}ffn_down{tail}.weight", (hidden, width), "Q8_0"
        if routed:
            yield f"{prefix}ffn_gate_inp.weight", (experts, hidden), "F32"
            yield f"{prefix}exp_probs_b.bias", (experts,), "F32"
            yield f"{prefix}ffn_gate_exps.weight", (experts, inner, hidden), kind
            yield f"{prefix}ffn_up_exps.weight", (experts, inner, hidden), kind
            yield f"{prefix}ffn_down_exps.weight", (experts, hidden, inner), kind


def write_gguf(path: Path, layers: int, kind: str) -> None:
    """Write a random model; a file that is cut short is not left behind."""
    import gguf  # noqa: PLC0415 - an extra

    scratch = path.with_suffix(".part")
    writer = gguf.GGUFWriter(scratch, ARCHITECTURE)
    add_sizes(writer, layers)
    random = np.random.default_rng(0)
    tensors = list(peer_tensors(layers, kind))
    for name, shape, type_name in tensors:
        type_ = gguf.GGMLQuantizationType[type_name]
        if type_name == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
            continue
        elements, size = gguf.GGML_QUANT_SIZES[type_]
        packed = (*shape[:-1], shape[-1] // elements * size)
        writer.add_tensor_info(
            name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=type_
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, type_name in tensors:
        writer.write_tensor_data(tensor_data(name, shape, type_name, random))
    writer.close()
    scratch.replace(path)


def tensor_data(
    name: str, shape: tuple[int, ...], kind: str, random: np.random.Generator
) -> npt.NDArray[Any]:
    """Norms are ones, biases zeros, routers small; the rest random blocks."""
    if kind != "F32":
        return random_blocks(kind, shape, random)
    if name.endswith("ffn_gate_inp.weight"):
        return random.standard_normal(shape, np.float32) * np.float32(0.02)
    return np.full(shape, 0 if name.endswith("bias") else 1, np.float32)


def add_sizes(writer: Any, layers: int) -> None:
    """Metadata that llama.cpp asks for; a model without a vocabulary."""
    inner = SHAPE["moe_intermediate_size"]
    writer.add_block_count(layers)
    writer.add_context_length(COMMON["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_key_length(COMMON["head_dim"])
    writer.add_value_length(COMMON["head_dim"])
    writer.add_rope_dimension_count(COMMON["head_dim"])
    writer.add_rope_freq_base(COMMON["rope_theta"])
    writer.add_layer_norm_rms_eps(COMMON["rms_norm_eps"])
    writer.add_expert_count(SHAPE["moe_num_experts"])
    writer.add_expert_used_count(SHAPE["moe_k"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_count(SHAPE["moe_num_shared_experts"])
    writer.add_expert_shared_feed_forward_length(inner * SHAPE["moe_num_shared_experts"])
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(SHAPE["moe_layer_start_index"])
    writer.add_vocab_size(COMMON["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


# -- both engines ----------------------------------------------------------------------------------


class Ours:
    """A resident model of dummy weights; experts are drawn uniformly, as trained routers do."""

    def __init__(self, args: argparse.Namespace) -> None:
        from fastdeploy_lite.worker.model_runner import ModelRunner  # noqa: PLC0415

        self._args = args
        shape = {**COMMON, **SHAPE, "num_hidden_layers": args.layers}
        # All routed experts in 2 bits: those of the peer are of one type, too.
        shape["quantization_config"] = {
            "quantization": "wint2",
            "dense_quant_type": args.dense,
            "moe_quant_type": "w4w2",
            "moe_quant_config": {
                "moe_w4_quant_config": {"quant_start_layer": 0, "quant_end_layer": 0},
                "moe_w2_quant_config": {"quant_start_layer": 1},
            },
        }
        length = args.prefill + args.decode + 2 * BLOCK_SIZE
        head = None if args.head == "bf16" else args.head
        config = RuntimeConfig(
            model_path=Path(),
            model=ModelConfig.from_dict(shape, "21b"),
            cache=CacheConfig(gpu_memory_utilization=0.5),
            scheduler=SchedulerConfig(1, max_num_batched_tokens=length, max_model_len=length),
            load=LoadConfig(load_choices="dummy", lm_head_quantization=head),
            activation_bits=args.activation_bits,
        )
        self._runner = ModelRunner(config)
        self._runner.load_model()
        self._runner.allocate_kv_cache(length // BLOCK_SIZE + 1)
        self.gigabytes = sum(self._runner.memory_report().weights.values()) / 1e9
        if "ccq" not in {weight.kind for weight in self._runner.model.weights()["experts"]}:
            raise SystemExit("the routed experts are not in 2 bits")
        self._routing = UniformRouting(self._runner)
        keep_what_is_loaded()  # as the engine's process does

    def round(self) -> Speed:
        """One prompt and what follows it."""
        args = self._args
        sequences = Sequences(self._runner, 1, args.prefill, args.decode + 1)
        prefill = sequences.prefill(args.prefill)
        started = time.perf_counter()
        for _ in range(args.decode):
            sequences.decode()
        return Speed(args.prefill / prefill, args.decode / (time.perf_counter() - started))


def peer_round(args: argparse.Namespace) -> Speed:
    """One run of llama-bench, which loads, warms up and measures once."""
    command = [str(args.llama_bench), "-m", str(args.gguf), "-t", str(args.threads), "-r", "1"]
    command += ["-p", str(args.prefill), "-n", str(args.decode), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{args.llama_bench} failed with status {done.returncode}: {last}")
    found = {"prefill" if run["n_prompt"] else "decode": run for run in json.loads(done.stdout)}
    return Speed(found["prefill"]["avg_ts"], found["decode"]["avg_ts"])


# -- the table -------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_table(kind: str, ours: list[Speed], peer: list[Speed], bandwidth: list[float]) -> None:
    """A row an engine, and the ratios of the pairs."""
    print("\n| | prefill, tokens/s | decode, tokens/s |\n|---|---|---|")
    for name, speeds in (("ours", ours), (f"llama.cpp {kind}", peer)):
        print(
            f"| {name} | {spread([s.prefill for s in speeds])}"
            f" | {spread([s.decode for s in speeds])} |"
        )
    pairs = list(zip(ours, peer, strict=True))
    print(
        f"| ratio of a round's pair | {spread([a.prefill / b.prefill for a, b in pairs])}"
        f" | {spread([a.decode / b.decode for a, b in pairs])} |"
    )
    print(f"\nMemory read in the same rounds: {spread(bandwidth)} GB/s")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--llama-bench", type=Path, required=True, help="the program llama-bench")
    add("--gguf", type=Path, required=True, help="the peer's model; written where it is not there")
    add("--type", choices=sorted(SCALES_AT), default="Q2_K", help="of the peer's routed experts")
    add("--layers", type=int, default=28, help="of both models; those of a GGUF that is there")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--prefill", type=int, default=512)
    add("--decode", type=int, default=48)
    add("--dense", choices=("wint8", "wint4"), default="wint8", help="our other linears")
    add("--head", choices=("wint8", "bf16"), default="wint8", help="our output head")
    add("--activation-bits", type=int, choices=(16, 24), default=24, help="of our products")
    return parser.parse_args()


def main() -> None:
    """Write what is missing, then measure in turn."""
    args = parse_options()
    if not args.llama_bench.is_file():
        sys.exit(f"--llama-bench: {args.llama_bench} is not there: build it as --help says")
    if not args.gguf.exists():
        write_gguf(args.gguf, args.layers, args.type)
    _ops_cpu.set_num_threads(args.threads)
    engine = Ours(args)
    print(f"{processor.describe()}; {args.layers} layers")
    print(f"ours {engine.gigabytes:.2f} GB, peer {args.gguf.stat().st_size / 1e9:.2f} GB")
    engine.round()  # warm up
    ours: list[Speed] = []
    peer: list[Speed] = []
    bandwidth: list[float] = []
    for number in range(args.rounds):
        bandwidth.append(read_bandwidth(READ_BYTES) / 1e9)
        ours.append(engine.round())
        peer.append(peer_round(args))
        print(f"round {number + 1}: ours {ours[-1]}, peer {peer[-1]}", flush=True)
    print_table(args.type, ours, peer, bandwidth)


if __name__ == "__main__":
    main()
