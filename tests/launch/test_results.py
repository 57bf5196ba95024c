"""What a trainer left, or that it left nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from post_training.errors import TrainerError
from post_training.launch.results import read_result
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.trainer import RESULT_FILE, TrainerResult, TrainerSpec
from tests.requests_of import sft_body


def spec_in(folder: Path, attempt_id: str) -> TrainerSpec:
    return TrainerSpec(
        request=SupervisedFineTuneRequest.model_validate(sft_body()),
        model="org/model",
        train_data="/rows.jsonl",
        validation_data=None,
        checkpoint_dir=None,
        work_dir=folder,
        attempt=1,
        attempt_id=attempt_id,
        tracking=None,
    )


def test_the_result_is_the_attempts_own(tmp_path: Path) -> None:
    result = TrainerResult(status="completed", attempt_id="a")
    (tmp_path / RESULT_FILE).write_text(result.model_dump_json())
    assert read_result(spec_in(tmp_path, "a"), 0) == result
    with pytest.raises(TrainerError, match="exit code 0 and no result"):
        read_result(spec_in(tmp_path, "b"), 0)


@pytest.mark.parametrize(("code", "said"), [(3, "exit code 3"), (-9, "signal 9; out of memory")])
def test_a_process_without_a_result_is_told_of(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(TrainerError, match=said):
        read_result(spec_in(tmp_path, ""), code)
