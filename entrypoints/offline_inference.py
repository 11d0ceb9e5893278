"""Offline inference: loads a 2Bits checkpoint and answers prompts in chat form.

python entrypoints/offline_inference.py [--model DIR] [--max-tokens N] [PROMPT ...]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.checkpoint.hub import resolve_model
from fastdeploy_lite.checkpoint.reader import Checkpoint

DEFAULT_PROMPTS = ("解析三首李白的诗", "What is a gourd?")


def expert_bits_per_weight(model_dir: Path) -> float | None:
    """Stored bits per routed-expert weight, scales and codes included; None for a dense model."""
    checkpoint = Checkpoint.open(model_dir)
    config = checkpoint.config
    moe_layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    if moe_layers == 0:
        return None
    stored = sum(checkpoint.info(key).nbytes for key in checkpoint if ".mlp.experts." in key)
    expert_weights = 3 * config.hidden_size * config.moe_intermediate_size
    return 8 * stored / (moe_layers * config.moe_num_experts * expert_weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=DEFAULT_PROMPTS, metavar="PROMPT")
    parser.add_argument("--model", default="demo", help="checkpoint folder (default: the demo)")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()

    model_dir = resolve_model(args.model)
    start = time.perf_counter()
    llm = LLM(model=str(model_dir), tensor_parallel_size=1, use_cudagraph=True)
    load_seconds = time.perf_counter() - start

    sampling = SamplingParams(temperature=0.7, top_p=0, max_tokens=args.max_tokens)
    conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompts]
    start = time.perf_counter()
    outputs = llm.chat(conversations, sampling)
    seconds = time.perf_counter() - start

    for prompt, output in zip(args.prompts, outputs, strict=True):
        print(f"\nUser: {prompt}\nAssistant: {output.outputs.text}")
    generated = sum(len(output.outputs.token_ids) for output in outputs)
    bits = expert_bits_per_weight(model_dir)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nload time              {load_seconds:8.2f} s")
    print(f"generated              {generated:8d} tokens in {seconds:.2f} s")
    print(f"speed                  {generated / seconds:8.1f} tokens/s ({len(outputs)} sequences)")
    if bits is not None:
        print(f"expert weights         {bits:8.3f} bits per weight, all scales included")
    print(f"peak memory            {peak_mib:8.0f} MiB (resident, Python and Paddle included)")


if __name__ == "__main__":
    main()
