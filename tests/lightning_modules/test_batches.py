"""Tensors of batches, by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.data.tokenize import Example, Pair


def example(length: int, first: int = 1) -> Example:
    ids = list(range(first, first + length))
    return Example(ids, [-100, *ids[1:]])


def test_collate_pads_to_the_longest_and_ends_before_the_last_scored_token() -> None:
    batch = collate([[example(3)], [example(4, first=5)]], 9, Arrangement.PADDED)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [5, 6, 7]]
    assert batch["predictors"].tolist() == [0, 1, 3, 4, 5]
    assert batch["targets"].tolist() == [2, 3, 6, 7, 8]
    assert (batch["tokens"], batch["scored"], batch["units"]) == (7, 5, 5)
    assert "position_ids" not in batch


def test_what_follows_the_last_scored_token_is_left_out() -> None:
    dialog = Example([1, 2, 3, 4, 5, 6], [-100, -100, 3, -100, -100, -100])
    batch = collate([[dialog]], 0, Arrangement.TREE)
    assert batch["input_ids"].tolist() == [[1, 2]]
    assert (batch["predictors"].tolist(), batch["targets"].tolist()) == ([1], [3])
    assert batch["tokens"] == 6


def test_collate_restarts_positions_in_packed_rows() -> None:
    batch = collate([[example(3), example(4, first=5)], [example(4)]], 0, Arrangement.PACKED)
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6, 7], [1, 2, 3, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch["predictors"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["targets"].tolist() == [2, 3, 6, 7, 8, 2, 3, 4]
    assert "layout" not in batch


def test_one_row_has_no_padding() -> None:
    batch = collate([[example(3)], [example(4, first=5)]], 0, Arrangement.FLAT)
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert [segment.span for segment in batch["layout"].segments] == [(0, 2), (2, 5)]
    assert batch["predictors"].tolist() == [0, 1, 2, 3, 4]


def test_a_shared_beginning_is_scored_for_each_sequence() -> None:
    first, second = (
        Example([*range(1, 31), last, 99], [-100, *range(2, 31), last, -100]) for last in (40, 50)
    )
    batch = collate([[first], [second]], 0, Arrangement.TREE)
    assert batch["input_ids"].tolist() == [list(range(1, 31))]
    assert batch["predictors"].tolist() == [*range(30), *range(30)]
    assert batch["targets"].tolist() == [*range(2, 31), 40, *range(2, 31), 50]
    assert (batch["tokens"], batch["scored"]) == (64, 60)


def pair(chosen: int, rejected: int, reference: list[float] | None = None) -> Pair:
    numbers = torch.tensor(reference) if reference is not None else None
    return Pair(example(chosen), example(rejected, first=10), numbers)


def test_pairs_take_two_rows_each_and_number_their_scored_tokens() -> None:
    rows = [[pair(3, 2, [0.1, 0.2, 0.3])], [pair(2, 4, [1.0, 2.0, 3.0, 4.0])]]
    batch = collate(rows, 0, Arrangement.PADDED)
    assert batch["input_ids"].tolist() == [[1, 2, 0], [10, 0, 0], [1, 0, 0], [10, 11, 12]]
    assert batch["predictors"].tolist() == [0, 1, 3, 6, 9, 10, 11]
    assert (batch["units"], batch["tokens"], batch["scored"]) == (2, 11, 7)
    assert batch["sequence"].tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch["reference"].tolist() == pytest.approx([0.1, 0.2, 0.3, 1.0, 2.0, 3.0, 4.0])


def test_packed_pairs_share_a_row_in_the_same_order() -> None:
    rows = [[pair(3, 2), pair(2, 2)], [pair(2, 4)]]
    batch = collate(rows, 0, Arrangement.PACKED)
    assert batch["input_ids"].tolist() == [[1, 2, 10, 1, 10], [1, 10, 11, 12, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 2, 0]]
    assert batch["sequence"].tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]
    assert (batch["units"], "reference" in batch) == (3, False)


def test_a_batch_has_references_only_if_every_pair_has_one() -> None:
    assert "reference" not in collate([[pair(2, 2, [0.1, 0.2])], [pair(2, 2)]], 0, Arrangement.TREE)
