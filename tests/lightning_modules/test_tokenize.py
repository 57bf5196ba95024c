"""Which tokens are learned, by hand."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lightning_modules.data.formats import BadRowError, Turn, dialog_turns
from lightning_modules.data.reading import RawDataset, Row
from lightning_modules.data.tokenize import IGNORED, Example, label, render, tokenize_dataset
from lightning_modules.models import FALLBACK_CHAT_TEMPLATE
from post_training.errors import DataError

MESSAGES = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "apples?"},
    {"role": "assistant", "content": "three "},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "four"},
]


def dataset(*rows: dict[str, Any]) -> RawDataset:
    return RawDataset("rows", "0", [Row(i, row) for i, row in enumerate(rows, start=1)])


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_labels_by_hand() -> None:
    #         0       1       2       3       4  tokens; the third straddles the first span's beginning
    offsets = [(0, 2), (2, 4), (4, 7), (7, 9), (9, 12)]
    assert label([5, 6, 7, 8, 9], offsets, [(2, 4), (6, 9)]).labels == [-100, 6, -100, 8, -100]
    assert label([5, 6], [(0, 2), (2, 2)], [(0, 9)]).labels == [-100, -100]  # the first, and one without text


def scored_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The runs of scored tokens, as text."""
    runs: list[list[int]] = [[]]
    for token in example.labels:
        if token == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [str(tokenizer.decode(run)) for run in runs if run]


def tokenized(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Example:
    given: dict[str, Any] = {"data_format": "dialog", "max_seq_length": 500} | options
    return tokenize_dataset(dataset({"messages": messages}), tokenizer, **given)[0]


def test_every_assistant_turn_is_scored_through_its_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenized(tokenizer, MESSAGES)
    assert scored_text(tokenizer, example) == ["three <|im_end|>", "four<|im_end|>"]
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_train_on_input_scores_all_but_the_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenized(tokenizer, MESSAGES, train_on_input=True)
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_the_fallback_template_ends_turns_with_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenized(with_template(tokenizer, FALLBACK_CHAT_TEMPLATE), MESSAGES)
    assert scored_text(tokenizer, example) == ["three <|im_end|>", "four<|im_end|>"]


def test_a_template_without_an_end_token_scores_the_line_end(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    example = tokenized(with_template(tokenizer, template), MESSAGES)
    assert scored_text(tokenizer, example) == [" three \n", " four\n"]


def test_an_unstable_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(BadRowError, match="renders the turns up to message 2 differently"):
        render(with_template(tokenizer, template), dialog_turns({"messages": MESSAGES}))


def test_a_template_that_refuses_a_role_makes_a_bad_row(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n turns') }}{% endif %}x"
    with pytest.raises(BadRowError, match="the chat template refuses it: no system turns"):
        render(with_template(tokenizer, template), [Turn(m, train=False) for m in MESSAGES])


def test_long_rows_are_cut_and_useless_ones_are_bad(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenized(tokenizer, MESSAGES)
    first_answer = next(i for i, token in enumerate(whole.labels) if token != IGNORED)
    cut = tokenized(tokenizer, MESSAGES, max_seq_length=first_answer + 2)
    assert cut.input_ids == whole.input_ids[: first_answer + 2]
    with pytest.raises(
        DataError, match=f"row 1: the prompt is longer than max_seq_length \\({first_answer} tokens"
    ):
        tokenized(tokenizer, MESSAGES, max_seq_length=first_answer)


GOOD, BAD = {"prompt": "x", "completion": "y"}, {"prompt": "x"}


def test_bad_rows_are_reported_by_number(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError) as caught:
        tokenize_dataset(
            dataset(*[GOOD] * 3, *[BAD] * 25), tokenizer, data_format="instruct", max_seq_length=99
        )
    sentence = str(caught.value)
    assert sentence.startswith("25 of 28 rows of rows are bad: row 4: completion must be text")
    assert "row 23: " in sentence
    assert "row 24: " not in sentence
    assert sentence.endswith("and 5 more")


def test_few_bad_rows_are_skipped_if_allowed(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"data_format": "instruct", "max_seq_length": 99}
    with caplog.at_level(logging.WARNING):
        examples = tokenize_dataset(
            dataset(GOOD, BAD, GOOD, GOOD), tokenizer, max_bad_row_fraction=0.25, **options
        )
    assert len(examples) == 3
    assert "1 of 4 rows of rows are bad and were skipped: row 2" in caplog.text
    with pytest.raises(DataError):
        tokenize_dataset(dataset(GOOD, BAD, GOOD, GOOD), tokenizer, max_bad_row_fraction=0.24, **options)
