"""The operators of a scheduled retraining: what it starts from, and what came of it.

Between them lie the training operators, ``EvaluateOperator``, ``GateOperator`` and ``PromoteOperator``, which
know nothing of a retraining: the macros here say to each stage what it is to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.skipmixin import SkipMixin
from airflow.sdk.exceptions import AirflowSkipException

from post_training.errors import TrainerError
from post_training.job_ids import TaskKey
from post_training.launch.local import PREPARE
from post_training.model_registry import ModelRegistry, Version
from post_training.operators.patience import persist
from post_training.operators.promotion import RegistryOperator
from post_training.operators.stage import StageOperator, checked
from post_training.operators.worker import PermanentFailureError, work_dir_of
from post_training.schemas import record as names
from post_training.schemas.base import parse_json_object
from post_training.schemas.flat import unflatten
from post_training.schemas.preparation import (
    DATA_FOLDER,
    DIGESTS_FILE,
    PREPARATION_RESULT_FILE,
    PREPARATION_SPEC_FILE,
    Part,
    PreparationResult,
    PreparationSource,
    PreparationSpec,
    SplitConfig,
)
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from post_training.schemas.retraining import MODEL_FIELDS, STAGES, RetrainingConfig, Stage
from post_training.schemas.trainer import TrackingTarget
from post_training.settings import load_settings
from post_training.stage_runs import StageRuns
from post_training.tracking import JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context

PREPARE_TASK, EVALUATE_TASK, GATE_TASK, APPROVE_TASK, PROMOTE_TASK = (
    "prepare",
    "evaluate",
    "gate",
    "approve",
    "promote",
)
"""Tasks of the retraining; between the first two lie its stages, under the names of ``STAGES``."""

ROWS, PAIRS = "rows", "pairs"
SOURCES = {SupervisedFineTuneRequest.method: ROWS, PreferenceOptimizeRequest.method: PAIRS}
"""Training method -> which of the prepared data it reads."""

TAG_TRAINED = "post_training.trained"
"""Of a promoted version: URI of the digests of all rows that it and those before it were trained on."""


class PrepareRetrainingOperator(StageOperator, SkipMixin):
    """Check the configuration, split the data, and say what each stage is to do.

    Its run is the parent of all of the retraining's; it holds the data that the stages read. The task is
    skipped, with the reason, where there is nothing new. Stages, and the approval, that are not wanted are
    skipped: they must be directly behind this task.

    :param config: a ``RetrainingConfig``, nested or with dotted keys, or a JSON string of it.
    """

    inherits_from_skipmixin = True
    template_fields: Sequence[str] = ("config", "experiment_name")
    template_fields_renderers: ClassVar[dict[str, str]] = {"config": "json"}
    ui_color = "#e4e4f4"

    def __init__(self, *, config: Mapping[str, Any] | str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config

    def work(self, context: Context, key: TaskKey, run: JobRun) -> dict[str, Any]:
        """Prepare the data, and return what the tasks behind need to know.

        :raises AirflowSkipException: if there is nothing to do.
        :raises PostTrainingError: if something cannot be had.
        """
        config = read_config(self.config)
        registry = ModelRegistry(self.tracking)
        champion = self._persist(registry.champion, config.model.name)
        base = self._resolver().model_named("model.base", config.model.base)
        tags = {names.TAG_REGISTERED_MODEL: config.model.name}
        self._persist(self.tracking.set_tags, run.run_id, tags)
        prepared = self._prepare(config, key, run, champion)
        night = config.digest(
            {name: source.digest for name, source in prepared.sources.items()},
            champion.number if champion is not None else None,
        )
        self._skip_unless_new(config, prepared, run, night)
        start = champion.uri if champion is not None and config.model.start_from == "champion" else base
        outcome = {
            "mlflow_run_id": run.run_id,
            "registered_model": config.model.name,
            "base": base,
            "start": start,
            "checkpoint": config.checkpoint,
            "requests": {stage: self._request(config, stage, run, prepared) for stage in config.stages},
            "evaluation": self._evaluation(config, run, prepared),
            "gate": config.gate.model_dump(mode="json"),
            "lineage": self._lineage(config, run, prepared, base, start, champion),
        }
        self._skip_unwanted(config, context, outcome)
        return outcome

    def _end(self, run: JobRun | None, status: str, error: str | None = None) -> None:
        """Leave the run open for the stages, unless there are none to come."""
        if status == "FAILED" and run is not None:
            super()._end(run, status, error)

    def _prepare(
        self, config: RetrainingConfig, key: TaskKey, run: JobRun, champion: Version | None
    ) -> PreparationResult:
        """Split the data, and put the parts into the run.

        :raises TrainerError: if they cannot be read.
        """
        settings, resolver, data = load_settings(), self._resolver(), config.data
        work_dir = work_dir_of(key)
        rows = self._persist(resolver.dataset, "data.dataset_id", data.dataset_id)
        sources = {
            ROWS: PreparationSource(
                source=rows, method=SupervisedFineTuneRequest.method, data_format=data.data_format
            )
        }
        if data.preference_dataset_id is not None:
            pairs = self._persist(resolver.dataset, "data.preference_dataset_id", data.preference_dataset_id)
            sources[PAIRS] = PreparationSource(
                source=pairs, method=PreferenceOptimizeRequest.method, data_format=data.data_format
            )
        spec = PreparationSpec(
            split=SplitConfig.model_validate(
                {name: getattr(data, name) for name in SplitConfig.model_fields}
            ),
            sources=sources,
            trained=champion.tags.get(TAG_TRAINED) if champion is not None else None,
            model_roots=resolver.model_roots(),
            work_dir=work_dir,
            max_data_bytes=settings.max_data_bytes,
            tracking=TrackingTarget(tracking_uri=self.tracking.server.uri, run_id=run.run_id),
        )
        shutil.rmtree(work_dir, ignore_errors=True)
        result = self._run_program(
            PREPARE, spec, work_dir / PREPARATION_SPEC_FILE, PREPARATION_RESULT_FILE, PreparationResult
        )
        shutil.rmtree(work_dir, ignore_errors=True)
        if result.status == "failed":
            kind = PermanentFailureError if result.permanent else TrainerError
            raise kind(result.error or "The data could not be prepared, without a reason.")
        return result

    def _skip_unless_new(
        self, config: RetrainingConfig, prepared: PreparationResult, run: JobRun, night: str
    ) -> None:
        """Leave out what has been done.

        :raises AirflowSkipException: saying what.
        """
        new = sum(source.new_rows for source in prepared.sources.values())
        reason = None
        if new == 0 and (config.data.skip_unchanged or config.data.rows == "new"):
            reason = (
                f"No row of the data is new since the last promotion of {config.model.name}:"
                " there is nothing to learn."
            )
        elif config.data.skip_unchanged and (decided := self._persist(self._decided, run, night)) is not None:
            reason = (
                f"The same data and configuration were {decided.tags[names.TAG_DECISION]} in MLflow run"
                f" {decided.run_id}."
            )
        tags = {names.TAG_NIGHT: night}
        if reason is not None:
            tags |= {names.TAG_DECISION: names.SKIPPED, names.TAG_REASON: reason}
        self._persist(self.tracking.set_tags, run.run_id, tags)
        if reason is not None:
            raise AirflowSkipException(reason)

    def _decided(self, run: JobRun, night: str) -> JobRun | None:
        """Return the run in which the same was decided on before, None where there is none."""
        decisions = (names.PROMOTED, names.REJECTED)
        return next(
            (
                other
                for other in self.tracking.tagged(names.TAG_NIGHT, night)
                if other.run_id != run.run_id and other.tags.get(names.TAG_DECISION) in decisions
            ),
            None,
        )

    def _request(
        self, config: RetrainingConfig, stage: Stage, run: JobRun, prepared: PreparationResult
    ) -> dict[str, Any]:
        """Return a stage's request without the model to start from, which another stage may make.

        :raises TrainerError: if there is nothing to train on.
        """
        source = SOURCES[STAGES[stage]]
        train = _uri(run, prepared, source, "train")
        if train is None:
            raise PermanentFailureError(f"The training part of the {source} is empty: {stage} cannot train.")
        return config.stage_request(stage, None, train, _uri(run, prepared, source, "validation"))

    def _evaluation(
        self, config: RetrainingConfig, run: JobRun, prepared: PreparationResult
    ) -> dict[str, Any]:
        """Return the evaluation's config, its data filled in.

        :raises TrainerError: if there is nothing to evaluate on.
        """
        own = config.evaluation
        rows = own.dataset_id or _uri(run, prepared, ROWS, "evaluation")
        if rows is None:
            raise PermanentFailureError(
                "The evaluation part of the rows is empty: data.evaluation_fraction"
                f" {config.data.evaluation_fraction} of so few rows is none."
            )
        filled = {
            "dataset_id": rows,
            "data_format": (own if own.dataset_id else config.data).data_format.value,
            "preference_dataset_id": own.preference_dataset_id or _uri(run, prepared, PAIRS, "evaluation"),
        }
        return {**own.model_dump(mode="json"), **filled}

    def _lineage(
        self,
        config: RetrainingConfig,
        run: JobRun,
        prepared: PreparationResult,
        base: str,
        start: str,
        champion: Version | None,
    ) -> dict[str, str]:
        """Return the tags of a version that comes of this."""
        digests = {f"post_training.digest.{name}": one.digest for name, one in prepared.sources.items()}
        return {
            "post_training.retraining": run.run_id,
            "post_training.base_model": base,
            "post_training.started_from": start,
            "post_training.replaces": champion.uri if champion is not None else "",
            "post_training.request": config.digest(),
            TAG_TRAINED: f"runs:/{run.run_id}/{DATA_FOLDER}/{DIGESTS_FILE}",
            **digests,
        }

    def _skip_unwanted(self, config: RetrainingConfig, context: Context, outcome: dict[str, Any]) -> None:
        """Skip the tasks behind that are not wanted."""
        wanted = {*config.stages, *([APPROVE_TASK] if config.approval.required else [])}
        unwanted = {*STAGES, APPROVE_TASK} - wanted
        tasks = [task for task in context["task"].get_direct_relatives() if task.task_id in unwanted]
        if tasks:
            context["ti"].xcom_push(key="return_value", value=outcome)
            self.skip(context["ti"], tasks)


def _uri(run: JobRun, prepared: PreparationResult, source: str, part: Part) -> str | None:
    """Return where a part of the data is, None where it is empty."""
    found = prepared.sources.get(source)
    file = found.files.get(part) if found is not None else None
    return f"runs:/{run.run_id}/{DATA_FOLDER}/{file}" if file is not None else None


def read_config(given: Mapping[str, Any] | str) -> RetrainingConfig:
    """Validate a retraining's configuration, nested or with dotted keys.

    :raises InvalidRequestError: naming each field, rule and value.
    """
    value = dict(parse_json_object(given))
    if any("." in name for name in value):
        value = unflatten(RetrainingConfig, value, form_defaults={})
    return checked(RetrainingConfig, value, "")


def stage_request(ti: Any, stage: Stage) -> dict[str, Any]:
    """Return the request of a stage: a macro of the retraining's DAG.

    It starts from the checkpoint of the stage before, if there was one.
    """
    night = ti.xcom_pull(task_ids=PREPARE_TASK)
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    model = next(_checkpoints(ti, reversed(earlier), night["checkpoint"]), night["start"])
    return {**night["requests"][stage], MODEL_FIELDS[STAGES[stage]]: model}


def candidate(ti: Any) -> str:
    """Return the MLflow URI of the checkpoint that the last stage made: a macro of the retraining's DAG."""
    night = ti.xcom_pull(task_ids=PREPARE_TASK)
    return next(_checkpoints(ti, reversed(list(STAGES)), night["checkpoint"]))


def _checkpoints(ti: Any, stages: Iterator[Stage], which: str) -> Iterator[str]:
    """Yield the checkpoint of each stage that was trained."""
    for stage in stages:
        outcome = ti.xcom_pull(task_ids=stage)
        if outcome is not None:
            found = outcome["checkpoints"]
            if which == "best":
                yield min(found, key=lambda one: one["training_metrics"]["validation_loss"])["path"]
            else:
                yield found[-1]["path"]


MACROS = {"stage_request": stage_request, "candidate": candidate}
"""Of the retraining's DAG."""


class ConcludeRetrainingOperator(RegistryOperator):
    """Write into the retraining's run how it ended, why, and what it cost; runs whatever happened before."""

    ui_color = "#e4e4f4"

    def work(self, context: Context) -> dict[str, Any]:
        """Sum up.

        :raises RecordUnavailableError: if MLflow does not answer.
        """
        ti = context["ti"]
        states = ti.get_task_states(dag_id=ti.dag_id, run_ids=[ti.run_id])[ti.run_id]
        key = TaskKey(ti.dag_id, ti.run_id, PREPARE_TASK)
        return persist(lambda: self._conclude(ti, key, states))

    def _conclude(self, ti: Any, key: TaskKey, states: Mapping[str, Any]) -> dict[str, Any]:
        runs = StageRuns(self.tracking)
        run = runs.find(key) or runs.open(key)
        children = runs.children(run.run_id)
        decision, reason = _decision(ti, run, states, children)
        cost = _cost(children)
        runs.log_metrics(run.run_id, cost)
        tags = {names.TAG_DECISION: decision, names.TAG_REASON: reason}
        self.tracking.set_tags(run.run_id, tags)
        failed = decision == names.FAILED
        self.tracking.set_status(
            run.run_id, "FAILED" if failed else "FINISHED", error=reason if failed else None
        )
        self.log.info("%s: %s", decision, reason)
        return {"mlflow_run_id": run.run_id, "decision": decision, "reason": reason, **cost}


def _decision(ti: Any, run: JobRun, states: Mapping[str, Any], children: Sequence[JobRun]) -> tuple[str, str]:
    """Return how the retraining ended and the sentence that says why."""
    failed = [task for task, state in states.items() if state == "failed"]
    if failed:
        errors = (child.tags.get(names.TAG_ERROR) for child in (*children, run))
        error = next(filter(None, errors), "see its log.")
        return names.FAILED, f"{', '.join(sorted(failed))} failed: {error}"
    decision = run.tags.get(names.TAG_DECISION, "")
    if decision == names.ACCEPTED and states.get(PROMOTE_TASK) != "success":
        answer = ti.xcom_pull(task_ids=APPROVE_TASK) or {}
        who = (answer.get("responded_by_user") or {}).get("name") or "nobody in time"
        return names.REJECTED, f"The gates accepted the candidate, but it was not approved: asked, {who}."
    if decision == names.ACCEPTED:
        decision = names.PROMOTED
    return decision or names.FAILED, run.tags.get(names.TAG_REASON, "It ended before a decision.")


def _cost(children: Sequence[JobRun]) -> dict[str, float]:
    """Add up what the stages used: seconds on a device, and tokens that were trained."""
    return {
        metric: sum(child.metrics.get(metric, 0.0) for child in children)
        for metric in (names.METRIC_DEVICE_SECONDS, names.METRIC_JOB_TOKENS)
    }
