"""entrypoints/study_codes.py: the bounds that it prints hold for the encoder beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "entrypoints" / "study_codes.py"


def test_no_encoder_is_better_than_all_its_scales_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--rows", "256", "--columns", "4", "--codes", "1,3,5"]) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(line[0]) for line in lines] == [1, 3, 5]
    encoder, together = ([float(line[column]) for line in lines] for column in (1, 3))
    assert together == sorted(together, reverse=True)
    for found, bound in zip(encoder, together, strict=True):
        assert 0.08 < bound <= found < 1.02 * bound
