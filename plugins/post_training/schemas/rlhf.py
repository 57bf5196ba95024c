"""The long form of a preference job's body, and the one request that both forms stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from post_training.schemas.algorithms import RLHFAlgorithm
from post_training.schemas.base import StrictModel
from post_training.schemas.requests import (
    LENIENT,
    REQUESTS,
    AnyTrainingRequest,
    JobRequest,
    JsonDPOConfig,
    PreferenceOptimizeRequest,
)
from post_training.schemas.rules import RULES, Broken, check
from post_training.schemas.search_rules import SEARCH_RULES
from post_training.schemas.training import DATA_DEFAULTS, DataConfig, OptimizerConfig

PLACES = {
    "finetuned_model": "finetuned_model.uri",
    "training_config.data_config.dataset_id": "dataset_id",
    "training_config.data_config.validation_dataset_id": "validation_dataset_id",
}
"""Field of the short form -> where the long form has it, of those that can be refused after the schema."""


class URL(StrictModel):
    """A model's address."""

    uri: str = Field(
        min_length=1,
        description="A hub id, a path under an allowed root, or an MLflow URI, as in the short form.",
    )


class PostTrainingRLHFRequest(JobRequest):
    """The published schema's long form of a preference job: data and optimizer beside the training loop.

    ``training_config`` may hold ``data_config`` and ``optimizer_config`` too. They complete what stands
    here and must not contradict it; without a ``data_config``, batch_size is 4, shuffle true and data_format
    instruct.
    """

    finetuned_model: URL = Field(description="Model to start from.")
    dataset_id: str = Field(min_length=1, description="Preference data to train on.")
    validation_dataset_id: str = Field(min_length=1, description="Held-out preference data.")
    algorithm: RLHFAlgorithm = Field(strict=False, description="Preference algorithm: dpo.")
    algorithm_config: JsonDPOConfig = Field(description="Parameters of the preference loss.")
    optimizer_config: OptimizerConfig = Field(description="The optimizer, its learning rate and warm-up.")

    @model_validator(mode="after")
    def _fits_together(self) -> PostTrainingRLHFRequest:
        check(self, (_says_one_thing, _keeps_the_short_forms_rules))
        return self

    def to_preference_optimize(self) -> PreferenceOptimizeRequest:
        """Return the short form, the request that is trained, recorded and hashed."""
        own = self.training_config.data_config
        data = DataConfig.model_validate(
            {
                **(DATA_DEFAULTS if own is None else dict(own)),
                "dataset_id": self.dataset_id,
                "validation_dataset_id": self.validation_dataset_id,
            }
        )
        # Every part is valid, and so is the whole: _fits_together has asked the short form's rules.
        request = PreferenceOptimizeRequest.model_construct(
            job_uuid=self.job_uuid,
            finetuned_model=self.finetuned_model.uri,
            algorithm_config=self.algorithm_config,
            training_config=self.training_config.model_copy(
                update={"data_config": data, "optimizer_config": self.optimizer_config}
            ),
            hyperparam_search_config=self.hyperparam_search_config,
            logger_config=self.logger_config,
            runtime=self.runtime,
        )
        request._places = PLACES
        return request


def _says_one_thing(request: PostTrainingRLHFRequest) -> Iterator[Broken]:
    """What stands both at the top and in ``training_config`` must be the same."""
    config = request.training_config
    twins = {"optimizer_config": ("training_config.optimizer_config", config.optimizer_config)}
    if config.data_config is not None:
        for name in ("dataset_id", "validation_dataset_id"):
            twins[name] = (f"training_config.data_config.{name}", getattr(config.data_config, name))
    for name, (twin, value) in twins.items():
        if value is not None and value != getattr(request, name):
            shown = f" {value[:80]!r}" if isinstance(value, str) else ""
            yield Broken(name, f"must be the same as {twin}{shown}")


def _keeps_the_short_forms_rules(request: PostTrainingRLHFRequest) -> Iterator[Broken]:
    short = request.to_preference_optimize()
    for rule in (*RULES[short.method], *SEARCH_RULES):
        yield from rule(short)


def is_long_form(body: Any) -> bool:
    """Whether a body of ``preference-optimize`` has the long form, by fields that only this one has so."""
    return isinstance(body, Mapping) and (
        "algorithm" in body or isinstance(body.get("finetuned_model"), Mapping)
    )


def read_request(method: str, body: Any, *, strict: bool | None = None) -> AnyTrainingRequest:
    """Validate a body of a training method, in whichever of its forms it is.

    :param strict: False reads numbers and flags from text, as templates render them.
    :raises ValidationError: with each field's path in the form that was given.
    """
    context = LENIENT if strict is False else None
    if method == PreferenceOptimizeRequest.method and is_long_form(body):
        long = PostTrainingRLHFRequest.model_validate(body, strict=strict, context=context)
        return long.to_preference_optimize()
    return REQUESTS[method].model_validate(body, strict=strict, context=context)


PreferenceBody = Annotated[
    PreferenceOptimizeRequest,
    BeforeValidator(
        partial(read_request, PreferenceOptimizeRequest.method),
        json_schema_input_type=PreferenceOptimizeRequest | PostTrainingRLHFRequest,
    ),
]
"""Body of ``preference-optimize``: either form."""
