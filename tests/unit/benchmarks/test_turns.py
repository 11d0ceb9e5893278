"""Comparisons in pairs: they resolve what each of the two alone would not."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_lite.benchmarks.turns import ratio_interval


def test_a_machine_that_drifts_disturbs_both() -> None:
    rng = np.random.default_rng(1)
    drift = rng.uniform(1.0, 4.0, 400)
    these = drift * rng.uniform(0.97, 1.03, 400)
    those = drift * rng.uniform(0.97, 1.03, 400) / 0.98
    _, (low, high) = ratio_interval(these.tolist(), those.tolist())
    assert low < 0.98 < high
    error_of_one = np.std(these / these.mean()) / np.sqrt(len(these))
    assert high - low < 0.01 < error_of_one


def test_what_is_rare_and_long_counts() -> None:
    those = [1.0] * 100
    those[50] = 101.0
    ratio, (low, high) = ratio_interval([1.0] * 100, those)
    assert ratio == pytest.approx(0.5)
    assert low < 0.4
    assert high > 0.9


@pytest.mark.parametrize(("these", "those"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_are_no_pairs_is_refused(these: list[float], those: list[float]) -> None:
    with pytest.raises(ValueError, match="are no pairs"):
        ratio_interval(these, those)
