"""What a job's run says from the start."""

from __future__ import annotations

import pytest

from post_training.job_ids import TaskKey
from post_training.record import new_run, run_params, run_tags
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from tests.requests_of import LORA, dpo_body, sft_body

KEY = TaskKey("nightly", "run", "sft", 2)


def test_tags_lead_back_to_the_task() -> None:
    request = SupervisedFineTuneRequest.model_validate(sft_body(logger_config={"tags": {"team": "a"}}))
    tags = run_tags(request, KEY)
    assert tags == {
        "team": "a",
        "post_training.job_uuid": "nightly.run.sft.2",
        "post_training.payload_hash": request.payload_hash(),
        "post_training.method": "supervised_fine_tune",
        "airflow.dag_id": "nightly",
        "airflow.run_id": "run",
        "airflow.task_id": "sft",
        "airflow.map_index": "2",
    }


def test_a_job_without_a_task_has_its_own_id() -> None:
    request = SupervisedFineTuneRequest.model_validate(sft_body())
    assert run_tags(request, None) == {
        "post_training.job_uuid": "job-1",
        "post_training.payload_hash": request.payload_hash(),
        "post_training.method": "supervised_fine_tune",
    }


def test_params_are_what_was_set() -> None:
    params = run_params(SupervisedFineTuneRequest.model_validate(sft_body(runtime={"seed": 3})))
    assert params["algorithm_config.rank"] == 4
    assert params["runtime.seed"] == 3
    assert "training_config.optimizer_config.lr" not in params
    assert "logger_config" not in params
    assert not [name for name in params if name.startswith("runtime.adapter")]


def test_params_that_a_search_varies_are_left_open() -> None:
    config = {"space": {"algorithm_config.rank": {"type": "int", "low": 2, "high": 8}}, "n_trials": 2}
    request = SupervisedFineTuneRequest.model_validate(sft_body(hyperparam_search_config=config))
    params = run_params(request)
    assert "algorithm_config.rank" not in params
    assert (params["algorithm_config.alpha"], params["hyperparam_search_config"]) == (8, config)


def test_params_of_a_preference_job_name_its_adapters() -> None:
    params = run_params(PreferenceOptimizeRequest.model_validate(dpo_body(runtime={"adapter": LORA})))
    assert (params["runtime.adapter.type"], params["runtime.adapter.rank"]) == ("LoRA", 4)
    assert (params["algorithm_config.beta"], params["algorithm_config.loss_type"]) == (0.1, "sigmoid")
    assert params["finetuned_model"] == "org/model"


def test_rows_sent_inside_the_request_are_not_copied_into_params() -> None:
    shown = {
        "data:,secret": "data: URI of 12 characters",
        "DATA:,secret": "data: URI of 12 characters",
        "HTTPS://host/rows.jsonl?signature=secret": "HTTPS://host/rows.jsonl",
    }
    for dataset, text in shown.items():
        body = sft_body(training_config__data_config__dataset_id=dataset)
        params = run_params(SupervisedFineTuneRequest.model_validate(body))
        assert params["training_config.data_config.dataset_id"] == text


def test_the_key_of_a_signed_address_is_nowhere_in_the_record() -> None:
    signed = "HTTPS://host/rows.jsonl?X-Amz-Signature=secret"
    body = sft_body(
        training_config__data_config__dataset_id=signed,
        training_config__data_config__validation_dataset_id=signed.lower(),
    )
    run = new_run(SupervisedFineTuneRequest.model_validate(body), KEY)
    assert "secret" not in repr(run)
    data = run["request"]["training_config"]["data_config"]
    assert data["dataset_id"] == "HTTPS://host/rows.jsonl"
    assert data["validation_dataset_id"] == "https://host/rows.jsonl"
    assert run["request"]["algorithm_config"]["lora_attn_modules"] == LORA["lora_attn_modules"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("https://user:hunter2@host/rows.jsonl", "https://host/rows.jsonl"),
        ("https://user:pass/hunter2@host/rows.jsonl", "https://host/rows.jsonl"),
        ("https:/user:hunter2@host/rows.jsonl", "https:/host/rows.jsonl"),
        ("https://host:1/a@b/rows.jsonl#hunter2", "https://host:1/a@b/rows.jsonl"),
        (" https://host/my rows.jsonl?X-Amz-Signature=hunter2", " https://host/my rows.jsonl"),
        ("http://host/rows.jsonl?X-Amz-Signature=hunter2", "http://host/rows.jsonl"),
        ("//user:hunter2@host/rows.jsonl", "//host/rows.jsonl"),
        ("ftp://user:hunter2@host/rows.jsonl", "ftp://host/rows.jsonl"),
        ("s3://AKIA:hunter2@bucket/rows.jsonl", "s3://bucket/rows.jsonl"),
        ("s3:AKIA:hunter2@bucket/rows.jsonl", "s3:bucket/rows.jsonl"),
        ("az://hunter2@evil.example/rows.jsonl", "az://evil.example/rows.jsonl"),
        (
            "az://box@me.blob.core.windows.net/rows.jsonl?sig=hunter2",
            "az://box@me.blob.core.windows.net/rows.jsonl",
        ),
        ("huggingface://user:hunter2@org/name", "huggingface://org/name"),
        ("huggingface://datasets/org/name?token=hunter2", "huggingface://datasets/org/name"),
        ("huggingface://datasets/org/name?hunter2", "huggingface://datasets/org/name"),
        (
            "huggingface://datasets/org/name?split=train&name=a",
            "huggingface://datasets/org/name?split=train&name=a",
        ),
        ("models:/name@champion/rows.jsonl", "models:/name@champion/rows.jsonl"),
        ("file:///data/a@b/rows.jsonl", "file:///data/a@b/rows.jsonl"),
        ("data/what?.jsonl", "data/what?.jsonl"),
    ],
)
def test_what_may_be_a_secret_is_nowhere_in_the_record(name: str, kept: str) -> None:
    """The record is made before any name is checked."""
    body = sft_body(training_config__data_config__dataset_id=name, model=name)
    run = new_run(SupervisedFineTuneRequest.model_validate(body), KEY)
    assert "hunter2" not in repr(run)
    assert run["params"]["training_config.data_config.dataset_id"] == kept
    assert run["request"]["training_config"]["data_config"]["dataset_id"] == kept
    assert run["params"]["model"] == run["request"]["model"] == kept


def test_a_text_with_a_colon_is_no_address() -> None:
    body = sft_body(logger_config={"run_name": "Why: is it? #1"})
    run = new_run(SupervisedFineTuneRequest.model_validate(body), KEY)
    assert run["request"]["logger_config"]["run_name"] == "Why: is it? #1"


def test_rows_sent_inside_the_request_are_kept_with_it() -> None:
    """They are in no other place, and without them the job could not be repeated."""
    body = sft_body(training_config__data_config__dataset_id="data:,rows?")
    run = new_run(SupervisedFineTuneRequest.model_validate(body), KEY)
    assert run["request"]["training_config"]["data_config"]["dataset_id"] == "data:,rows?"
