"""OpenAPI: what is described is what is accepted."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.api.conftest import Deployment
from tests.requests_of import LORA, QAT, dpo_body, rlhf_body, sft_body


@pytest.mark.parametrize(
    ("path", "body", "accepted"),
    [
        *(
            ("supervised-fine-tune", sft_body(**changes), accepted)
            for changes, accepted in (
                ({}, True),
                ({"training_config": json.dumps(sft_body()["training_config"])}, True),
                ({"algorithm_config": json.dumps(LORA)}, True),
                ({"algorithm_config": None, "runtime": None, "model": None}, True),
                ({"algorithm_config": QAT | {"quantizer_name": "8da4w-qat"}, "runtime__adapter": LORA}, True),
                ({"logger_config": {"log_model": True, "sample_prompts": ["Hello?"]}}, True),
                ({"runtime": {"export": "merged"}}, True),
                ({"job_uuid": "scheduled__1"}, False),
                ({"job_uuid": "a..b"}, False),
                ({"job_uuid": "a/b"}, False),
                ({"colour": "red"}, False),
                ({"training_config__n_epochs": 0}, False),
                ({"training_config__dtype": "fp8"}, False),
                ({"algorithm_config__rank": "4"}, False),
                ({"algorithm_config": QAT | {"quantizer_name": "int2"}}, False),
                ({"hyperparam_search_config": {"n_trials": 3}}, False),
                ({"logger_config": {"wandb": True}}, False),
                ({"logger_config": {"log_model": "some"}}, False),
                ({"logger_config": {"sample_prompts": [""]}}, False),
                ({"runtime": {"devices": 2, "strategy": "fsdp"}}, True),
                ({"runtime": {"devices": 0}}, False),
            )
        ),
        *(
            ("preference-optimize", body, accepted)
            for body, accepted in (
                (dpo_body(), True),
                (dpo_body(algorithm_config="{}", runtime={"adapter": LORA}), True),
                (dpo_body(runtime={"reference_logprobs": "live", "adapter": LORA}), True),
                (dpo_body(finetuned_model=...), False),
                (dpo_body(algorithm_config__gamma=2.0), False),
                (dpo_body(dataset_id="train.jsonl"), False),
                (dpo_body(runtime={"reference_logprobs": "cached"}), False),
                (rlhf_body(), True),
                (rlhf_body(runtime={"seed": 3}, algorithm_config="{}"), True),
                (rlhf_body(algorithm="ppo"), False),
                (rlhf_body(finetuned_model="org/model"), False),
                (rlhf_body(validation_dataset_id=...), False),
                (rlhf_body(optimizer_config__lr=0), False),
            )
        ),
    ],
)
def test_what_is_described_is_what_is_accepted(
    deployment: Deployment, path: str, body: dict[str, Any], accepted: bool
) -> None:
    document = deployment.client().get("/openapi.json").json()
    operation = document["paths"][f"/v1/post-training/{path}"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    assert validator.is_valid(body) is accepted
    answer = deployment.client().post(f"/v1/post-training/{path}", json=body)
    assert (answer.status_code == 200) is accepted, answer.text


def test_the_description_is_strict(deployment: Deployment) -> None:
    document = deployment.client().get("/openapi.json").json()
    bodies = [name for name in document["components"]["schemas"] if name.endswith("Request")]
    assert bodies
    for name in bodies:
        assert document["components"]["schemas"][name]["additionalProperties"] is False
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["security"], path
            assert {"200", "401"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"], path
