"""A card's decode step from the host's side: how long the card waits for the next one."""

from __future__ import annotations

import json
from collections.abc import Callable

from machine import handicap

# Microseconds where `machine.work` takes its 200; about twice what host_step.py gives there.
MOST_BETWEEN_STEPS = {1: 250, 64: 1000}


def test_a_card_waits_less_than_a_quarter_of_a_millisecond_for_its_next_step(
    on_card_in_memory: Callable[..., str],
) -> None:
    batches = ",".join(map(str, MOST_BETWEEN_STEPS))
    lines = on_card_in_memory("host_step.py", "--json", "--steps", "200", "--batches", batches)
    for line in lines.splitlines():
        found = json.loads(line)
        most = MOST_BETWEEN_STEPS[found["batch"]] * handicap(found["python"] * 1e-6)
        assert 0 < found["gap"] < most, found
        assert found["step"] >= found["gap"]
