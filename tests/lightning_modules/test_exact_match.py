"""What counts as the right answer, and which rows are asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_modules.data.content import Row
from lightning_modules.data.formats import dialog_turns, instruct_turns
from lightning_modules.exact_match import Question, answers_of, extracted, is_right, questions_of

GSM8K = r"#### *(-?[0-9.,]+)"


@pytest.mark.parametrize(
    ("pattern", "text", "value"),
    [
        (GSM8K, "First 3.\n#### 1,234", "1234"),
        (GSM8K, "#### 7\nno,\n####-8.", "-8"),  # the last one counts, and a full stop is none of its digits
        (GSM8K, "the answer is 7", None),
        (r"[A-E]\b", "A or B", "B"),
        (r"yes (\d)?", "yes ", None),  # the group takes no part
    ],
)
def test_the_last_match_counts(pattern: str, text: str, value: str | None) -> None:
    assert extracted(pattern, text) == value


def test_right_is_what_is_found_in_both() -> None:
    assert is_right(GSM8K, "so #### 1234", "#### 1,234")
    assert not is_right(GSM8K, "#### 12", "#### 1,234")
    assert not is_right(GSM8K, "no number", "none either")


def test_a_question_is_all_before_the_last_learned_turn() -> None:
    turns = ["Hi", "Hello", "What is 1 + 1?", "#### 2"]
    roles = ["user", "assistant"] * 2
    dialog = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=True)]
    rows = [Row(1, {"messages": dialog}), Row(2, {"messages": []})]
    found = questions_of(rows, lambda row: [dialog_turns(row)])
    assert found == {1: Question(dialog[:3], "#### 2")}
    assert found[1].text == "What is 1 + 1?"
    single = questions_of([Row(4, {"question": "Q", "answer": "A"})], lambda row: [instruct_turns(row)])
    assert single == {4: Question([{"role": "user", "content": "Q"}], "A")}


def test_prompts_of_any_length_are_answered_as_if_alone(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    texts = ["how many apples are in", "the red basket of my friend? " * 9, "a", "my friend"]
    asked = {i: Question([{"role": "user", "content": text}], "") for i, text in enumerate(texts)}
    together = answers_of(model, tokenizer, asked, max_new_tokens=9, batch_size=3)
    for i, question in asked.items():
        alone = answers_of(model, tokenizer, {i: question}, max_new_tokens=9, batch_size=1)
        assert together[i] == alone[i] != ""


def test_a_prompt_that_leaves_no_room_has_no_answer(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    long = " ".join(["how many apples are in the red basket of my friend?"] * 40)
    asked = {i: Question([{"role": "user", "content": text}], "") for i, text in enumerate(["a", long])}
    found = answers_of(model, tokenizer, asked, max_new_tokens=9, batch_size=2)
    assert found[0] != ""
    assert found[1] == ""
