"""What the server's start says of the weights and how they are computed."""

from __future__ import annotations

from collections.abc import Iterator

from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.request.messages import Ready

MIB = 1 << 20
_SUMS = {
    True: "the same bits for a token in any step (FD_DETERMINISTIC_MODE=1)",
    False: "steps of few tokens may sum faster, to other last bits than prompts "
    "(FD_DETERMINISTIC_MODE=1: the same bits in any step)",
}


def weight_lines(model: ModelConfig, ready: Ready, on_card: bool, same_bits: bool) -> Iterator[str]:
    """Lines for the console.

    Args:
        model: what is served.
        ready: what the engine says of it.
        on_card: whether the engine computes on a card.
        same_bits: FD_DETERMINISTIC_MODE.
    """
    weights = sum(n for name, n in ready.memory.items() if name.startswith("weights."))
    yield (
        f"Weights: {model.describe_weights()}; {ready.bits_per_expert_weight:.3f} bits per expert "
        f"weight, {weights / MIB:.1f} MiB"
    )
    offloaded = ready.memory.get("offloaded_experts", 0)
    if offloaded:
        yield f"Experts in main memory, computed by the CPU: {offloaded / MIB:.1f} MiB more"
    if ready.row_order:
        yield f"2-bit rows: {ready.row_order}"
    if ready.row_order and on_card and ready.memory.get("weights.experts"):
        yield f"2-bit experts on the card: {_SUMS[same_bits]}"
