"""Means of sums."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.means import Means, perplexity


def test_means_are_over_all_values() -> None:
    means = Means()
    means.add("loss", torch.tensor(6.0), 2)
    means.add("loss", 4.0, 3)
    means.add("other", 1.0, 4)
    assert means.mean("loss") == 2.0
    assert means.all() == {"loss": 2.0, "other": 0.25}
    assert math.isnan(means.mean("unknown"))
    means.add("empty", 0.0, 0)
    assert math.isnan(means.mean("empty"))


def test_saved_sums_go_on() -> None:
    means = Means()
    means.add("loss", torch.tensor(6.0), 2)
    again = Means(means.sums())
    again.add("loss", 3.0, 1)
    assert again.mean("loss") == pytest.approx(3.0)
    assert means.mean("loss") == 3.0


def test_perplexity_stays_finite() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert math.isfinite(perplexity(1e9))
