"""The table of a race, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.speed_report import HEAD, WEIGHTS, write_report

LIBRARIES = {"torch": "2.13"}


def contender(seconds: float, peak_gib: float, **facts: Any) -> dict[str, Any]:
    return {"of_an_epoch": seconds, "peak": peak_gib * 2**30, "samples": 8, "losses": [[1.5, 1.25]]} | facts


def test_ratios_are_of_the_seconds_and_shares_of_the_useful_products(tmp_path: Path) -> None:
    flops = 4 * (WEIGHTS * 1000 + HEAD * 100)
    figures: dict[str, Any] = {
        "machine": {"date": "2026-11-28", "device": "2 cores", "libraries": LIBRARIES, "allocator": "glibc"},
        "gemm": flops / 1.0,  # what the machine could do in a second
        "races": {
            "SFT": {
                "TRL default": contender(10.0, 4),
                "TRL best": contender(5.0, 2),
                "ours": contender(2.0, 1, tokens=1000, scored=100),
            }
        },
        "deviations": {"SFT": {"ours": [0.01, 0.0201]}},
        "start": {"begins": 8.25, "ends": 9.75},
        "precision": {"ours": {"token": 0.04171, "answer": 0.5}},
        "sweeps": {"batch": [{"batch": 1, "tokens_per_second": 10.0, "peak": 2**30}]},
    }
    text = write_report(figures, tmp_path)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["TRL default", "100", "0.80", "1.00", "0.50", "4.00", "1.00", "10%"] in lines
    assert ["TRL best", "200", "1.60", "2.00", "1.00", "2.00", "0.50", "20%"] in lines
    assert ["ours", "500", "4.00", "5.00", "2.50", "1.00", "0.25", "50%"] in lines
    assert ["ours", "1.5000 1.2500"] in lines
    assert ["SFT", "ours", "0.0100 0.0201"] in lines
    assert ["ours", "0.0417", "0.500"] in lines
    assert ["1", "10", "1.00"] in lines
    assert "8.2 s to its first step and 9.8 s to that step's end." in text
    assert (tmp_path / "speed.md").read_text() == text
    assert "<svg" in (tmp_path / "speed.svg").read_text()


def test_a_race_without_trl_has_no_ratios(tmp_path: Path) -> None:
    figures: dict[str, Any] = {
        "machine": {"date": "2026-11-28", "device": "2 cores", "libraries": LIBRARIES, "allocator": "glibc"},
        "gemm": 1e12,
        "races": {"full": {"full": contender(10.0, 4, tokens=1000, scored=100)}},
        "deviations": {},
        "precision": {},
        "start": {},
        "sweeps": {},
    }
    assert "| full | 100 | 0.80 |  |  | 4.00 |  |" in write_report(figures, tmp_path)
