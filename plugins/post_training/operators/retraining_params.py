"""The file that configures a scheduled retraining: when it runs, and the defaults of its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from airflow.sdk import Asset, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable, Param
from airflow.sdk.definitions.asset import AssetUriRef
from pydantic import ValidationError

from post_training.errors import InvalidRequestError
from post_training.operators.params import form_param
from post_training.operators.retraining import ONLY_IN_THE_FILE
from post_training.schemas.flat import at, leaves
from post_training.schemas.requests import error_details
from post_training.schemas.retraining import RetrainingConfig, RetrainingFile
from post_training.settings import load_settings

OUR_ASSETS = "x-post-training://"

SECTIONS: dict[str, str] = {
    "model": "Model",
    "data": "Data",
    "supervised_fine_tune": "Stages",
    "preference_optimize": "Stages",
    "quantize": "Stages",
    "checkpoint": "Stages",
    "evaluation": "Evaluation",
    "gate": "Promotion",
    "approval": "Promotion",
}
"""Field -> section of the form, in the order of the form."""


def load_retraining(default: Path) -> RetrainingFile:
    """Read the file of ``[post_training] retraining_config``.

    :param default: is read where the setting is empty.
    :raises InvalidRequestError: naming each field, rule and value; it is the DAG's import error.
    """
    path = load_settings().retraining_config or default
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return RetrainingFile.model_validate(content, strict=False)
    except ValidationError as error:
        details = error_details(error.errors())
        raise InvalidRequestError([{**one, "loc": [path.name, *one["loc"]]} for one in details]) from None
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequestError.of("retraining_config", f"cannot be read: {error}") from None


def retraining_schedule(file: RetrainingFile) -> Any:
    """Return what wakes the DAG: a time, an asset, either, or nothing."""
    schedule = file.schedule
    assets = AssetAny(*map(_asset, schedule.assets)) if schedule.assets else None
    if schedule.cron is None:
        return assets
    timetable = CronTriggerTimetable(schedule.cron, timezone=schedule.timezone)
    return timetable if assets is None else AssetOrTimeSchedule(timetable=timetable, assets=assets)


def _asset(uri: str) -> Asset | AssetUriRef:
    """Return an asset of ours, or a reference to one that another DAG defines under a name of its own."""
    return Asset(uri) if uri.startswith(OUR_ASSETS) else Asset.ref(uri=uri)


def retraining_params(file: RetrainingFile) -> dict[str, Param]:
    """Return the params of the DAG, keyed by dotted path, with the file's values as defaults."""
    body = file.model_dump(mode="json")
    ordered = sorted(
        leaves(RetrainingConfig).values(),
        key=lambda leaf: (
            list(SECTIONS).index(leaf.path.partition(".")[0]),
            leaf.optional or not leaf.required,
        ),
    )
    return {
        leaf.path: form_param(
            leaf, {leaf.path: at(body, leaf.path.split("."))}, SECTIONS[leaf.path.partition(".")[0]]
        )
        for leaf in ordered
        if leaf.path not in ONLY_IN_THE_FILE
    }
