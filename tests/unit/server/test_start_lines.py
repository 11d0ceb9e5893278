"""What the server says of a model's weights when it starts."""

from __future__ import annotations

import pytest

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.entrypoints.openai.start_lines import weight_lines
from fastdeploy_lite.request.messages import Ready

MEMORY = {"weights.attention": 1 << 20, "weights.experts": 3 << 19, "kv_cache": 7 << 20}
TWO_BITS = Ready(10, 1.0, "nvidia:0", MEMORY, 2.0625, "natural order, as the files say")


def lines(ready: Ready, on_card: bool = True, same_bits: bool = False) -> list[str]:
    model = ModelConfig.from_dir(demo_path())
    return list(weight_lines(model, ready, on_card, same_bits))


def test_formats_sizes_and_row_order() -> None:
    assert lines(TWO_BITS, on_card=False) == [
        "Weights: int8 linears, ccq experts; 2.062 bits per expert weight, 2.5 MiB",
        "2-bit rows: natural order, as the files say",
    ]


@pytest.mark.parametrize(
    ("same_bits", "words"),
    [
        (False, "steps of few tokens may sum faster, to other last bits than prompts"),
        (True, "the same bits for a token in any step (FD_DETERMINISTIC_MODE=1)"),
    ],
)
def test_on_a_card_it_is_said_what_2_bit_experts_promise(same_bits: bool, words: str) -> None:
    *_, line = lines(TWO_BITS, same_bits=same_bits)
    assert line.startswith(f"2-bit experts on the card: {words}")
    assert "FD_DETERMINISTIC_MODE=1" in line


def test_nothing_is_said_of_what_is_not_on_the_card() -> None:
    memory = {"weights.attention": 1 << 20, "weights.experts": 0, "offloaded_experts": 3 << 20}
    offloaded = lines(Ready(10, 1.0, "nvidia:0", memory, 2.0625, "natural order"))
    assert offloaded[1] == "Experts in main memory, computed by the CPU: 3.0 MiB more"
    assert not any("on the card" in line for line in offloaded)
    others = lines(Ready(10, 1.0, "nvidia:0", MEMORY, 4.0))
    assert len(others) == 1
