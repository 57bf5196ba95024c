"""The operators of a scheduled retraining: what it starts from, and what came of it.

Between them lie the training operators, ``EvaluateOperator``, ``GateOperator`` and ``PromoteOperator``, which
know nothing of a retraining: the macros here say to each stage what it is to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.skipmixin import SkipMixin
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from post_training.errors import InvalidRequestError, ModelError, RecordUnavailableError
from post_training.job_ids import TaskKey, plan_task_id, trials_task_id
from post_training.launch.local import PREPARE
from post_training.model_registry import ModelRegistry, Version
from post_training.night import PAIRS, ROWS, SOURCES, TAG_TRAINED, Night, trained_sources
from post_training.operators.links import MLflowRunLink
from post_training.operators.patience import persist
from post_training.operators.promotion import RegistryOperator
from post_training.operators.spec import resolver_of
from post_training.operators.stage import StageOperator, checked, parsed
from post_training.operators.worker import work_dir_of
from post_training.schemas import record as names
from post_training.schemas.flat import unflatten
from post_training.schemas.preparation import (
    DATA_FOLDER,
    DIGESTS_FILE,
    PREPARATION_RESULT_FILE,
    PREPARATION_SPEC_FILE,
    PreparationResult,
    PreparationSource,
    PreparationSpec,
    SplitConfig,
)
from post_training.schemas.retraining import MODEL_FIELDS, STAGES, RetrainingConfig, Stage
from post_training.schemas.trainer import TrackingTarget
from post_training.schemas.training import DatasetFormat
from post_training.settings import load_settings
from post_training.stage_runs import StageRuns
from post_training.tracking import SUPERSEDED, JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context

PREPARE_TASK, APPROVE_TASK, PROMOTE_TASK = "prepare", "approve", "promote"
"""Tasks of the retraining that others look at; its stages have the names of ``STAGES``."""

ONLY_IN_THE_FILE = ("approval.timeout_hours",)
"""Airflow fixes it with the DAG; a run cannot change it."""


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
        behind = context["task"].get_direct_relatives()
        _check_searches(config, {task.task_id for task in behind})
        registry = ModelRegistry(self.tracking)
        promoted = self.persist(registry.promoted, config.model.name, run.run_id)
        if promoted is not None:  # what it was made from stays as it is
            raise AirflowSkipException(
                f"This run has promoted {promoted.uri}: start a new one to train again."
            )
        self.persist(self.tracking.forget_tags, run.run_id, (names.TAG_DECISION, names.TAG_REASON))
        _check_libraries(config)
        champion = self.persist(registry.champion, config.model.name)
        base = self.persist(
            registry.pinned, resolver_of(self.tracking).model_named("model.base", config.model.base)
        )
        tags = {names.TAG_REGISTERED_MODEL: config.model.name}
        self.persist(self.tracking.set_tags, run.run_id, tags)
        prepared = self._prepare(config, key, run, champion)
        night = Night(config, run.run_id, prepared, base, champion.uri if champion is not None else None)
        self.persist(self.runs.log_metrics, run.run_id, night.metrics())
        self._skip_unless_new(night)
        outcome = night.outcome()
        self._skip_unwanted(night, context, outcome)
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
        settings, resolver = load_settings(), resolver_of(self.tracking)
        work_dir = work_dir_of(key)
        spec = PreparationSpec(
            split=SplitConfig.model_validate(
                {name: getattr(config.data, name) for name in SplitConfig.model_fields}
            ),
            sources=self._sources(config),
            held_out=self._held_out(config),
            trained=_trained_by(champion),
            starts_from_trained=config.model.start_from == "champion",
            model_roots=resolver.model_roots(),
            work_dir=work_dir,
            max_data_bytes=settings.max_data_bytes,
            tracking=TrackingTarget(tracking_uri=self.tracking.server.uri, run_id=run.run_id),
        )
        return self._run_program(
            PREPARE, spec, work_dir / PREPARATION_SPEC_FILE, PREPARATION_RESULT_FILE, PreparationResult
        )

    def _sources(self, config: RetrainingConfig) -> dict[str, PreparationSource]:
        """Return the data that is split."""
        data, trained = config.data, trained_sources(config)
        named = {
            ROWS: ("dataset_id", data.dataset_id),
            PAIRS: ("preference_dataset_id", data.preference_dataset_id),
        }
        return {
            name: self._source(f"data.{field}", dataset_id, name, data.data_format, name in trained)
            for name, (field, dataset_id) in named.items()
            if dataset_id is not None
        }

    def _held_out(self, config: RetrainingConfig) -> dict[str, PreparationSource]:
        """Return the data of the user's own that models are compared on."""
        own = config.evaluation
        named = {
            ROWS: ("dataset_id", own.dataset_id),
            PAIRS: ("preference_dataset_id", own.preference_dataset_id),
        }
        return {
            name: self._source(f"evaluation.{field}", dataset_id, name, own.data_format, False)
            for name, (field, dataset_id) in named.items()
            if dataset_id is not None
        }

    def _source(
        self, field: str, dataset_id: str, name: str, data_format: DatasetFormat, trained: bool
    ) -> PreparationSource:
        return PreparationSource(
            source=self.persist(resolver_of(self.tracking).dataset, field, dataset_id),
            method=next(method for method, source in SOURCES.items() if source == name),
            data_format=data_format,
            trained=trained,
        )

    def _skip_unless_new(self, night: Night) -> None:
        """Leave out what has been done.

        :raises AirflowSkipException: saying what.
        """
        digest, reason = night.digest(), night.nothing_new()
        if reason is None and night.config.data.skip_unchanged:
            decided = self.persist(self._decided, night.run_id, digest)
            if decided is not None:
                reason = (
                    f"The same data and configuration were {decided.tags[names.TAG_DECISION]} in MLflow run"
                    f" {decided.run_id}."
                )
        tags = {names.TAG_NIGHT: digest}
        if reason is not None:
            tags |= {names.TAG_DECISION: names.SKIPPED, names.TAG_REASON: reason}
        self.persist(self.tracking.set_tags, night.run_id, tags)
        if reason is not None:
            self._forget_parts(night)
            raise AirflowSkipException(reason)

    def _forget_parts(self, night: Night) -> None:
        """Delete what no stage will read: the same data every night, where little of it is new."""
        try:
            self.tracking.delete_files(night.run_id, night.files)
        except RecordUnavailableError as unavailable:  # only its space is lost
            self.log.warning("The data stays in MLflow run %s: %s", night.run_id, unavailable)

    def _decided(self, run_id: str, digest: str) -> JobRun | None:
        """Return the run in which the same was decided on before, None where there is none."""
        decisions = (names.PROMOTED, names.REJECTED)
        return next(
            (
                other
                for other in self.tracking.tagged(names.TAG_NIGHT, digest)
                if other.run_id != run_id and other.tags.get(names.TAG_DECISION) in decisions
            ),
            None,
        )

    def _skip_unwanted(self, night: Night, context: Context, outcome: dict[str, Any]) -> None:
        """Skip the tasks behind that are not wanted; what comes behind a search's plan is skipped with it."""
        left_out = STAGES.keys() - night.stages
        unwanted = {*left_out, *map(plan_task_id, left_out)}
        if not night.config.approval.required:
            unwanted.add(APPROVE_TASK)
        tasks = [task for task in context["task"].get_direct_relatives() if task.task_id in unwanted]
        if tasks:
            context["ti"].xcom_push(key="return_value", value=outcome)
            self.skip(context["ti"], tasks)


def _trained_by(champion: Version | None) -> str | None:
    """Return where the digests lie of what the champion was trained on.

    :raises ModelError: if its tag names another place: whoever writes to the registry may have written it.
    """
    uri = champion.tags.get(TAG_TRAINED) if champion is not None else None
    if uri is not None and not re.fullmatch(rf"runs:/[0-9a-f]{{32}}/{DATA_FOLDER}/{DIGESTS_FILE}", uri):
        raise ModelError(
            f"the tag {TAG_TRAINED} of {champion and champion.uri} must be of a retraining's own run"
        )
    return uri


def _check_searches(config: RetrainingConfig, behind: Set[str]) -> None:
    """Refuse a search for whose trials the DAG has no tasks.

    :param behind: ids of the tasks directly behind the preparation.
    :raises InvalidRequestError: naming the stage.
    """
    for stage in config.stages:
        if config.searches(stage) and plan_task_id(stage) not in behind:
            raise InvalidRequestError.of(
                f"{stage}.hyperparam_search_config",
                "needs a search in the file of the DAG, too: without one it has no tasks for trials",
            )


def _check_libraries(config: RetrainingConfig) -> None:
    """Refuse a confidence that could only fail after all is trained.

    :raises InvalidRequestError: naming the gate.
    """
    for number, gate in enumerate(config.gate.gates):
        if gate.confidence is not None and find_spec("scipy") is None:
            raise InvalidRequestError.of(
                f"gate.gates.{number}.confidence",
                f"needs scipy, of the extra 'search', got {gate.confidence}",
            )


def read_config(given: Mapping[str, Any] | str) -> RetrainingConfig:
    """Validate a retraining's configuration, nested or with dotted keys.

    :raises InvalidRequestError: naming each field, rule and value.
    """
    value = parsed(given, "config")
    if any("." in name for name in value):
        for name in ONLY_IN_THE_FILE:
            if name in value:
                raise InvalidRequestError.of(
                    name, f"is fixed by the file of the DAG: a run cannot change it, got {value[name]!r}"
                )
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
    found = next(_checkpoints(ti, reversed(list(STAGES)), night["checkpoint"]), None)
    if found is None:
        raise AirflowFailException("No stage has trained: there is no candidate.")
    return found


def _checkpoints(ti: Any, stages: Iterator[Stage], which: str) -> Iterator[str]:
    """Yield the checkpoint of each stage that was trained."""
    for stage in stages:
        outcome = ti.xcom_pull(task_ids=stage)
        if outcome is not None:
            found = outcome["checkpoints"]
            if which == "best":
                yield min(found, key=_validation_loss)["path"]
            else:
                yield found[-1]["path"]


def _validation_loss(checkpoint: Mapping[str, Any]) -> float:
    loss = checkpoint["training_metrics"]["validation_loss"]
    return math.inf if loss is None else float(loss)


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
        MLflowRunLink().note(self, ti, self.tracking.server.run_url(run.experiment_id, run.run_id))
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
    trials = tuple(map(trials_task_id, STAGES))  # a worker may fail: the stage takes the best of the others
    failed = sorted(
        task for task, state in states.items() if state == "failed" and not task.startswith(trials)
    )
    if failed:
        errors = (_error_of(task, run, children) for task in failed)
        return names.FAILED, f"{', '.join(failed)} failed: {next(filter(None, errors), 'see its log.')}"
    decision, reason = run.tags.get(names.TAG_DECISION), run.tags.get(names.TAG_REASON, "")
    if decision != names.ACCEPTED:
        return (decision, reason) if decision else (names.FAILED, "It ended before a decision.")
    if (states.get(APPROVE_TASK), states.get(PROMOTE_TASK)) != ("success", "skipped"):
        return names.FAILED, f"The gates accepted the candidate, but promote is {states.get(PROMOTE_TASK)}."
    user = ((ti.xcom_pull(task_ids=APPROVE_TASK) or {}).get("responded_by_user") or {}).get("name")
    if user is None:
        return names.EXPIRED, "The gates accepted the candidate, but nobody has approved it in time."
    return names.REJECTED, f"The gates accepted the candidate, but {user} did not approve it."


def _error_of(task: str, run: JobRun, children: Sequence[JobRun]) -> str | None:
    """Return why a task failed, as its own run says, or the night's for one that has none."""
    job = next((stage for stage in STAGES if plan_task_id(stage) == task), task)
    own = [
        child
        for child in children
        if child.tags.get(names.TAG_TASK_ID) == job
        and not child.tags.get(names.TAG_JOB_UUID, "").endswith(SUPERSEDED)
    ]
    return next((child.tags.get(names.TAG_ERROR) for child in own), run.tags.get(names.TAG_ERROR))


def _cost(children: Sequence[JobRun]) -> dict[str, float]:
    """Add up what the stages used, their trials too: seconds on a device, and tokens that were trained."""
    own_and_trials = {
        names.METRIC_DEVICE_SECONDS: (names.METRIC_DEVICE_SECONDS, names.METRIC_SEARCH_SECONDS),
        names.METRIC_JOB_TOKENS: (names.METRIC_JOB_TOKENS, names.METRIC_SEARCH_TOKENS),
    }
    return {
        metric: sum(child.metrics.get(one, 0.0) for child in children for one in parts)
        for metric, parts in own_and_trials.items()
    }
