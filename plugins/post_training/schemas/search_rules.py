"""Rules between a search and the request that its trials vary."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from post_training.schemas.flat import leaves
from post_training.schemas.rules import Broken, unsupported_here
from post_training.schemas.search import (
    ACCURACY,
    PREFERENCE_METRICS,
    SearchConfig,
)

if TYPE_CHECKING:
    from post_training.schemas.requests import AnyTrainingRequest

CONFIG = "hyperparam_search_config"
EPOCHS = "training_config.n_epochs"
VALIDATION = "training_config.max_validation_steps"

NOT_SEARCHED = {
    "model": "it is what is trained",
    "finetuned_model": "it is what is trained",
    "checkpoint_dir": "it is where copies go",
    "training_config.data_config.dataset_id": "it is what is trained on",
    "training_config.data_config.data_format": "it is how the data is written",
    "training_config.data_config.validation_dataset_id": "trials are compared on the same rows",
    "training_config.data_config.train_on_input": "trials are compared on the same tokens",
    "runtime.max_seq_length": "trials are compared on the same tokens",
    "runtime.max_bad_row_fraction": "trials are compared on the same rows",
    VALIDATION: "trials are compared on the same rows",
    "logger_config": "it is how the job is recorded",
    CONFIG: "it is the search itself",
}
"""Fields that no trial may vary -> why."""

_SIZES_OF_BATCHES = tuple(f"training_config.data_config.{name}" for name in ("batch_size", "packed"))


def with_values(request: AnyTrainingRequest, values: Mapping[str, Any]) -> AnyTrainingRequest:
    """Return the request with other values at dotted paths, and without a search.

    :raises ValidationError: if that is no valid request.
    """
    body = request.model_dump(mode="json")
    said = request.runtime.model_dump(mode="json", exclude_unset=True) if request.runtime else None
    body |= {"runtime": said, CONFIG: {}}
    for path, value in values.items():
        *groups, name = path.split(".")
        part = body
        for group in groups:
            part[group] = part.get(group) or {}
            part = part[group]
        part[name] = value
    return type(request).model_validate(body)


def searches_fields_of_the_request(request: AnyTrainingRequest) -> Iterator[Broken]:
    """Each path is a field of the request, and one that a trial may vary."""
    for path in _space(request):
        if path not in leaves(type(request)):
            close = difflib.get_close_matches(path, leaves(type(request)), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield Broken(f"{CONFIG}.space.{path}", f"is no field of a {request.method} request{hint}")
        elif path in NOT_SEARCHED:
            yield Broken(f"{CONFIG}.space.{path}", f"cannot be searched: {NOT_SEARCHED[path]}")


def every_trial_is_a_valid_request(request: AnyTrainingRequest) -> Iterator[Broken]:
    """Each field's lowest, highest and every chosen value is one that the request may have."""
    space = _space(request)
    if not space or any(searches_fields_of_the_request(request)):
        return
    first = {path: one.extremes[0] for path, one in space.items()}
    refused = _refusal(request, first)
    if refused is not None:
        field, why = refused
        if field in space:
            yield _invalid(field, first[field], why)
        else:
            yield Broken(f"{CONFIG}.space", f"makes a trial's request invalid: {why}")
        return
    for path, one in space.items():
        for value in one.extremes[1:]:
            refused = _refusal(request, {**first, path: value})
            if refused is not None:
                yield _invalid(path, value, refused[1])
                break


def _invalid(path: str, value: Any, why: str) -> Broken:
    shown = f"the value {value!r:.80}"
    return Broken(f"{CONFIG}.space.{path}", f"{shown} makes a trial's request invalid: {why}")


def _refusal(request: AnyTrainingRequest, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the field for which a trial of these values is refused, and why; None if it is not."""
    try:
        trial = with_values(request, values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"] if part not in ("LoRA", "QAT"))
        return field, f"{field}: {problem['msg']}"
    for detail in unsupported_here(trial):
        field = ".".join(map(str, detail["loc"]))
        return field, f"{field}: {detail['msg']}"
    return None


def measures_what_it_compares(request: AnyTrainingRequest) -> Iterator[Broken]:
    """The metric is one that the trials report, and means the same in all of them."""
    search = request.search
    if search is None:
        return
    metric, place = search.metric, f"{CONFIG}.metric"
    if request.method != "preference_optimize" and metric in PREFERENCE_METRICS:
        yield Broken(place, "is reported by preference jobs alone")
    limit = request.training_config.max_validation_steps
    if limit == 0:
        yield Broken(place, f"is measured by validation: there is none, {VALIDATION} is 0")
    sizes = [path for path in _SIZES_OF_BATCHES if path in search.space]
    if sizes and limit:
        yield Broken(VALIDATION, f"must be null where {sizes[0]} is searched: so many batches are other rows")
    of_loss = [path for path in search.space if path.startswith("algorithm_config.")]
    if request.method == "preference_optimize" and of_loss and metric != ACCURACY:
        yield Broken(place, f"must be {ACCURACY!r} where {of_loss[0]} is searched, which scales {metric!r}")


def keeps_what_it_uses(request: AnyTrainingRequest) -> Iterator[Broken]:
    """The best trial's checkpoints are in MLflow; copies in a folder are made by a training of the job's."""
    search = request.search
    if search is None or search.use != "checkpoint":
        return
    if request.logger.log_model is False:
        yield Broken("logger_config.log_model", f"must not be false: {CONFIG}.use is 'checkpoint'")
    if getattr(request, "checkpoint_dir", None) is not None:
        yield Broken(f"{CONFIG}.use", "must be 'retrain' for a checkpoint_dir")


def prunes_between_epochs(request: AnyTrainingRequest) -> Iterator[Broken]:
    """A trial is validated at the end of each epoch; after the last there is nothing to stop."""
    search = request.search
    if search is None or search.pruner == "none" or any(every_trial_is_a_valid_request(request)):
        return
    if longest(request, search) == 1:
        yield Broken(
            f"{CONFIG}.pruner",
            f"stops trials between epochs: {EPOCHS} must be above 1, or pruner be 'none'",
        )


def longest(request: AnyTrainingRequest, search: SearchConfig) -> int:
    """Return how many epochs a trial may have."""
    space = search.space.get(EPOCHS)
    return int(max(space.extremes)) if space is not None else request.training_config.n_epochs


def _space(request: AnyTrainingRequest) -> Mapping[str, Any]:
    search = request.search
    return search.space if search is not None else {}


SEARCH_RULES = (
    searches_fields_of_the_request,
    every_trial_is_a_valid_request,
    measures_what_it_compares,
    keeps_what_it_uses,
    prunes_between_epochs,
)
"""Of both training methods."""
