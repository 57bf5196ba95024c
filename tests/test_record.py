"""What a job's run says from the start."""

from __future__ import annotations

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


def test_params_are_what_was_set() -> None:
    params = run_params(SupervisedFineTuneRequest.model_validate(sft_body(runtime={"seed": 3})))
    assert params["algorithm_config.rank"] == 4
    assert params["runtime.seed"] == 3
    assert "training_config.optimizer_config.lr" not in params
    assert "logger_config" not in params
    assert not [name for name in params if name.startswith("runtime.adapter")]


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


def test_rows_sent_inside_the_request_are_kept_with_it() -> None:
    """They are in no other place, and without them the job could not be repeated."""
    body = sft_body(training_config__data_config__dataset_id="data:,rows?")
    run = new_run(SupervisedFineTuneRequest.model_validate(body), KEY)
    assert run["request"]["training_config"]["data_config"]["dataset_id"] == "data:,rows?"
