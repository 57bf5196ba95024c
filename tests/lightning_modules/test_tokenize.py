"""Which tokens are learned, by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lightning_modules.data.content import RawDataset, Row
from lightning_modules.data.formats import Turn, dialog_turns, instruct_turns
from lightning_modules.data.messages import BadRowError
from lightning_modules.data.tokenize import (
    IGNORED,
    Example,
    Tokenized,
    check_bad_rows,
    label,
    render,
    tokenize_rows,
)
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
    assert label([5, 6, 7, 8, 9], offsets, [(2, 4), (6, 9)]).labels.tolist() == [-100, 6, -100, 8, -100]
    assert label([5, 6], [(0, 2), (2, 2)], [(0, 9)]).labels.tolist() == [
        -100,
        -100,
    ]  # the first, and one without text


def scored_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The runs of scored tokens, as text."""
    runs: list[list[int]] = [[]]
    for token in example.labels:
        if token == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [str(tokenizer.decode(run)) for run in runs if run]


def read_dialog(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any
) -> Tokenized:
    given: dict[str, Any] = {"max_seq_length": 500} | options
    return tokenize_rows(
        dataset({"messages": messages}).rows, tokenizer, lambda row: [dialog_turns(row)], **given
    )


def tokenized(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Example:
    return read_dialog(tokenizer, messages, **options).rows[0][0]


def test_every_assistant_turn_is_scored_through_its_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenized(tokenizer, MESSAGES)
    assert scored_text(tokenizer, example) == ["three <|im_end|>", "four<|im_end|>"]
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert list(example.input_ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_train_on_input_scores_all_but_the_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenized(tokenizer, MESSAGES, train_on_input=True)
    assert list(example.labels) == [IGNORED, *example.input_ids[1:]]


def test_the_fallback_template_ends_turns_with_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    example = tokenized(with_template(tokenizer, FALLBACK_CHAT_TEMPLATE), MESSAGES)
    assert scored_text(tokenizer, example) == ["three <|im_end|>", "four<|im_end|>"]


def test_a_template_without_an_end_token_scores_the_line_end(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    example = tokenized(with_template(tokenizer, template), MESSAGES)
    assert scored_text(tokenizer, example) == [" three \n", " four\n"]


def test_an_unstable_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content | title }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(BadRowError, match="renders the turns up to message 2 differently"):
        render(with_template(tokenizer, template), dialog_turns({"messages": MESSAGES}))


def test_a_template_that_refuses_a_role_makes_a_bad_row(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n turns') }}{% endif %}x"
    with pytest.raises(BadRowError, match="the chat template refuses it: no system turns"):
        render(with_template(tokenizer, template), [Turn(m, train=False) for m in MESSAGES])


def test_long_rows_are_cut_and_useless_ones_are_bad(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenized(tokenizer, MESSAGES)
    first_answer = next(i for i, token in enumerate(whole.labels) if token != IGNORED)
    limited = read_dialog(tokenizer, MESSAGES, max_seq_length=first_answer + 2)
    assert list(limited.rows[0][0].input_ids) == list(whole.input_ids[: first_answer + 2])
    assert (limited.cut, read_dialog(tokenizer, MESSAGES).cut) == (1, 0)
    useless = read_dialog(tokenizer, MESSAGES, max_seq_length=first_answer)
    assert useless.rows == []
    assert useless.bad == {1: f"the prompt is longer than max_seq_length ({first_answer} tokens)"}


GOOD, BAD = {"prompt": "x", "completion": "y"}, {"prompt": "x"}


def test_rows_may_hold_several_conversations_and_keep_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["a", "b", "c d e f"]
    rows = dataset(*[{"texts": texts[i:]} for i in range(3)], BAD)

    def conversations(row: Any) -> list[list[Turn]]:
        if "texts" not in row:
            raise BadRowError("no texts")
        return [instruct_turns({"prompt": text, "completion": text}) for text in row["texts"]]

    result = tokenize_rows(rows.rows, tokenizer, conversations, max_seq_length=99)
    answers = [["".join(scored_text(tokenizer, example)) for example in row] for row in result.rows]
    assert answers == [[f"{text}<|im_end|>" for text in texts[i:]] for i in range(3)]
    assert result.bad == {4: "no texts"}


def test_bad_rows_are_reported_by_number() -> None:
    bad = {number: "completion must be text" for number in range(4, 29)}
    with pytest.raises(DataError) as caught:
        check_bad_rows(dataset(*[GOOD] * 3, *[BAD] * 25), bad, 0.0)
    sentence = str(caught.value)
    assert sentence.startswith(
        "25 of 28 rows of rows are bad and runtime.max_bad_row_fraction is 0: row 4: completion must be text"
    )
    assert "row 23: " in sentence
    assert "row 24: " not in sentence
    assert sentence.endswith("and 5 more")


def test_few_bad_rows_are_skipped_if_allowed() -> None:
    rows, bad = dataset(GOOD, BAD, GOOD, GOOD), {2: "completion must be text"}
    said = check_bad_rows(rows, bad, 0.25)
    assert said == "1 of 4 rows of rows are bad and were skipped: row 2: completion must be text"
    with pytest.raises(DataError):
        check_bad_rows(rows, bad, 0.24)
    assert check_bad_rows(rows, {}, 0.0) is None


TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}]


def test_tools_are_rendered_and_a_template_without_them_makes_a_bad_row(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = (
        "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join }}{% endif %}"
    )
    row = dataset({"messages": MESSAGES, "tools": TOOLS})

    def read(chat_template: str) -> Tokenized:
        changed = with_template(tokenizer, chat_template)
        return tokenize_rows(row.rows, changed, lambda row: [dialog_turns(row)], max_seq_length=500)

    (example,) = read(template + tokenizer.chat_template).rows[0]
    assert str(tokenizer.decode(example.input_ids)).startswith("count<|im_start|>system")
    assert scored_text(tokenizer, example) == ["three <|im_end|>", "four<|im_end|>"]
    assert read(tokenizer.chat_template).bad == {
        1: "the chat template has no place for tools, and the row has some"
    }


def test_half_a_surrogate_pair_is_a_bad_row(tokenizer: PreTrainedTokenizerBase) -> None:
    calls = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "\ud800"}}]}
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    result = tokenize_rows(
        dataset({"messages": [MESSAGES[1], calls]}).rows,
        with_template(tokenizer, template.replace("m.tool_calls", "m.tool_calls[0].function.name")),
        lambda row: [dialog_turns(row)],
        max_seq_length=99,
    )
    assert "the chat template refuses it" in result.bad[1]


def test_pairs_that_are_the_same_once_cut_are_bad(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = dataset({"a": "same words and then this", "b": "same words and then that"})

    def pairs(row: Any) -> list[list[Turn]]:
        return [instruct_turns({"prompt": "x", "completion": row[name]}) for name in "ab"]

    (whole,) = tokenize_rows(rows.rows, tokenizer, pairs, max_seq_length=99).rows
    same = next(i for i, (a, b) in enumerate(zip(*(e.input_ids for e in whole), strict=False)) if a != b)
    cut = tokenize_rows(rows.rows, tokenizer, pairs, max_seq_length=same)
    assert cut.bad == {1: f"its answers are the same within max_seq_length ({same} tokens)"}
    assert tokenize_rows(rows.rows, tokenizer, pairs, max_seq_length=same + 1).bad == {}


def test_tokens_that_the_model_does_not_know_are_bad(tokenizer: PreTrainedTokenizerBase) -> None:
    known = max(read_dialog(tokenizer, MESSAGES).rows[0][0].input_ids)
    assert read_dialog(tokenizer, MESSAGES, vocab_size=known + 1).bad == {}
    bad = read_dialog(tokenizer, MESSAGES, vocab_size=known).bad
    assert bad == {1: f"has the token {known}, and the model knows {known}"}


LAST_TURN_DIFFERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_thinks_in_the_last_turn_alone_scores_every_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Qwen 3's template does so."""
    example = tokenized(with_template(tokenizer, LAST_TURN_DIFFERS), MESSAGES)
    assert scored_text(tokenizer, example) == [
        "three <|im_end|>",
        "<think>\n\n</think>\n\nfour<|im_end|>",
    ]
