"""The operators that let a candidate take the champion's place in MLflow's registry, or the one before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Asset, AssetAlias, BaseOperator, BaseOperatorLink
from airflow.sdk.bases.skipmixin import SkipMixin
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from post_training.errors import DataError, InvalidRequestError, ModelError, PostTrainingError
from post_training.gates import decide
from post_training.model_registry import (
    TAG_CANDIDACY,
    Candidate,
    LostError,
    ModelRegistry,
    PromotedBeforeError,
    Version,
    checked_name,
)
from post_training.operators.hooks import MLflowHook
from post_training.operators.links import MLflowRunLink, ModelVersionLink
from post_training.operators.patience import persist
from post_training.operators.stage import checked, parsed, said
from post_training.operators.worker import task_key
from post_training.schemas import record as names
from post_training.schemas.evaluation import VALUES_FILE, EvaluationValues
from post_training.schemas.gates import Decision, GatesConfig
from post_training.settings import load_settings
from post_training.stage_runs import StageRuns, place_digest
from post_training.tracking import Tracking

if TYPE_CHECKING:
    from airflow.sdk import Context

PROMOTIONS = AssetAlias("post-training promotions")
"""What every promotion and rollback updates, whatever the model; see ``champion_asset`` for one model's."""

GATES_TABLE = "gates.json"


def champion_asset(name: str) -> Asset:
    """Return the asset that each promotion and rollback of a registered model updates.

    A DAG that is to run then is scheduled on it: ``schedule=[champion_asset("support")]``. The event's extra
    has ``model_uri``, ``version``, ``replaces``, ``reason`` and ``mlflow_run_id``.
    """
    return Asset(f"x-post-training://models/{quote(name, safe='')}/champion")


class RegistryOperator(BaseOperator):
    """Works on MLflow's registry, and tells errors that another attempt meets too from others."""

    operator_extra_links: Collection[BaseOperatorLink] = (MLflowRunLink(),)

    def execute(self, context: Context) -> Any:
        """Do the work.

        :raises AirflowFailException: if another attempt would fail the same way.
        :raises AirflowException: if it may succeed.
        """
        try:
            return self.work(context)
        except (InvalidRequestError, ModelError, DataError) as error:
            self._note(str(error), context["ti"])
            raise AirflowFailException(str(error)) from None
        except PostTrainingError as error:
            self._note(str(error), context["ti"])
            raise AirflowException(str(error)) from None

    @property
    def decision_run(self) -> tuple[str, str] | None:
        """The operator's parameter that names the MLflow run which it writes to, and the run's id."""
        return None

    def _note(self, error: str, ti: Any) -> None:
        """Let the run say why the task failed, if it can be reached."""
        if self.decision_run is not None:
            with suppress(PostTrainingError):
                self.tracking.set_tags(self._existing_run(ti), {names.TAG_ERROR: error})

    def _existing_run(self, ti: Any) -> str:
        """Return the id of the run that is written to, and let the task lead there.

        :raises InvalidRequestError: if there is none.
        """
        assert self.decision_run is not None  # noqa: S101
        parameter, run_id = self.decision_run
        run = persist(lambda: self.tracking.get(run_id))
        if run is None:
            raise InvalidRequestError.of(parameter, f"MLflow has no such run, got {run_id[:80]!r}")
        MLflowRunLink().note(self, ti, self.tracking.server.run_url(run.experiment_id, run_id))
        return run_id

    def _lead_to(self, version: Version, context: Context) -> None:
        url = self.tracking.server.version_url(version.name, version.number)
        ModelVersionLink().note(self, context["ti"], url)

    def work(self, context: Context) -> Any:
        """Do what the task is for; return what it hands on.

        :raises PostTrainingError: why it cannot.
        """
        raise NotImplementedError

    @cached_property
    def tracking(self) -> Tracking:
        """The tracking server, which holds the registry too."""
        return MLflowHook(load_settings().mlflow_conn_id).get_conn()

    @property
    def registry(self) -> ModelRegistry:
        """The champions."""
        return ModelRegistry(self.tracking)


class GateOperator(RegistryOperator, SkipMixin):
    """Hold an evaluation's candidate against champion and base; what comes after is skipped if it fails.

    Returns a ``Decision``: ``accepted``, ``reason`` and the outcome of each gate.

    :param evaluation_run_id: MLflow run of the evaluation, whose models are called candidate, champion, base.
    :param config: the gates (``GatesConfig``).
    :param decision_run_id: MLflow run that the decision is written to; None is the evaluation's.
    """

    inherits_from_skipmixin = True
    template_fields: Sequence[str] = ("evaluation_run_id", "config", "decision_run_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"config": "json"}
    ui_color = "#f4f0e0"

    def __init__(
        self,
        *,
        evaluation_run_id: str,
        config: Mapping[str, Any] | str,
        decision_run_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.evaluation_run_id = evaluation_run_id
        self.config = config
        self.decision_run_id = decision_run_id

    def work(self, context: Context) -> dict[str, Any]:
        """Decide, record why, and skip what is behind the gate if the candidate is rejected.

        :raises InvalidRequestError: if a gate's metric was not measured.
        """
        config = checked(GatesConfig, parsed(self.config, "config"), "config")
        self._existing_run(context["ti"])
        runs = StageRuns(self.tracking)
        content = persist(lambda: runs.read(self.evaluation_run_id, VALUES_FILE))
        decision = decide(config, EvaluationValues.model_validate_json(content))
        self.log.info("%s: %s", "accepted" if decision.accepted else "rejected", decision.reason)
        persist(lambda: self._record(runs, decision))
        outcome = decision.model_dump(mode="json")
        if not decision.accepted:
            behind = [task for task in context["task"].get_direct_relatives() if not task.is_teardown]
            context["ti"].xcom_push(key="return_value", value=outcome)
            self.skip(context["ti"], behind)
        return outcome

    @property
    def decision_run(self) -> tuple[str, str]:
        """The run that the decision is written to."""
        run_id = said(self.decision_run_id)
        name = "evaluation_run_id" if run_id is None else "decision_run_id"
        return name, str(run_id or self.evaluation_run_id)

    def _record(self, runs: StageRuns, decision: Decision) -> None:
        run_id = self.decision_run[1]
        runs.log_table(run_id, GATES_TABLE, *decision.table())
        word = names.ACCEPTED if decision.accepted else names.REJECTED
        self.tracking.set_tags(run_id, {names.TAG_DECISION: word, names.TAG_REASON: decision.reason})


class PromoteOperator(RegistryOperator):
    """Register a model with its lineage and make it the champion; a repeated task promotes once.

    The task is skipped, with the reason, where the champion is another one than the candidate was compared
    with, and where its run has promoted before. A mapped one (``partial().expand()``) must name
    ``outlets=[PROMOTIONS]`` itself.

    Returns ``version``, ``model_uri`` and ``replaces``; emits the event of ``champion_asset``.

    :param registered_model: its name in the registry.
    :param checkpoint: MLflow URI of the checkpoint.
    :param candidacy_run_id: MLflow run of what made it; a run promotes once.
    :param compared_with: number of the champion that the candidate was compared with; None or 0 is none.
    :param reason: one sentence: why it is promoted.
    :param lineage: tags of the version.
    """

    template_fields: Sequence[str] = (
        "registered_model",
        "checkpoint",
        "candidacy_run_id",
        "compared_with",
        "reason",
        "lineage",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"lineage": "json"}
    operator_extra_links = (MLflowRunLink(), ModelVersionLink())
    ui_color = "#e0f0e0"

    def __init__(
        self,
        *,
        registered_model: str,
        checkpoint: str,
        candidacy_run_id: str,
        compared_with: int | str | None = None,
        reason: str = "",
        lineage: Mapping[str, str] | str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["outlets"] = [*kwargs.get("outlets", ()), PROMOTIONS]
        super().__init__(**kwargs)
        self.registered_model = registered_model
        self.checkpoint = checkpoint
        self.candidacy_run_id = candidacy_run_id
        self.compared_with = compared_with
        self.reason = reason
        self.lineage = lineage

    def work(self, context: Context) -> dict[str, Any]:
        """Promote.

        :raises AirflowSkipException: if another version has become champion meanwhile.
        """
        candidate = self._candidate(context["ti"])
        try:
            version = persist(lambda: self.registry.promote(candidate))
        except PromotedBeforeError as before:
            raise AirflowSkipException(str(before)) from None
        except LostError as lost:
            self._decide(candidate.candidacy, names.REJECTED, str(lost))
            if lost.crowned is None:
                raise AirflowSkipException(str(lost)) from None
            version, reason = lost.crowned, "Its own promotion had been cut off, and was finished."
            self._decide(version.tags[TAG_CANDIDACY], names.PROMOTED, reason)
        else:
            reason = self.reason
            self._decide(candidate.candidacy, names.PROMOTED, reason)
        self._lead_to(version, context)
        self.log.info("%s is the champion: %s", version.uri, reason)
        outcome = {"version": version.number, "model_uri": version.uri, "replaces": candidate.against or None}
        run_id = version.tags.get(TAG_CANDIDACY)
        _announce(context, version, {**outcome, "reason": reason, "mlflow_run_id": run_id})
        return outcome

    def _candidate(self, ti: Any) -> Candidate:
        """Return what is to be promoted.

        :raises InvalidRequestError: naming the parameter.
        """
        against = said(self.compared_with) or 0
        if not str(against).isdecimal():
            raise InvalidRequestError.of("compared_with", f"must be a version's number, got {against!r}")
        lineage = parsed(said(self.lineage) or {}, "lineage")
        return Candidate(
            checked_name(str(self.registered_model)),
            self.checkpoint,
            self._existing_run(ti),
            int(against),
            {str(name): str(value) for name, value in lineage.items()},
            self.reason,
        )

    @property
    def decision_run(self) -> tuple[str, str]:
        """The run that may promote once."""
        return "candidacy_run_id", str(self.candidacy_run_id)

    def _decide(self, run_id: str, word: str, reason: str) -> None:
        tags = {names.TAG_DECISION: word, names.TAG_REASON: reason}
        persist(lambda: self.tracking.set_tags(run_id, tags))


class ApprovePromotionOperator(ApprovalOperator):
    """Ask a person whether to promote; who answered, or that nobody did, is returned also if it is a no."""

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Take the answer; what is behind is skipped if it is a no."""
        answer = {name: event.get(name) for name in ("chosen_options", "responded_by_user")}
        context["ti"].xcom_push(key="return_value", value=answer)
        return super().execute_complete(context, event)


class RollbackOperator(RegistryOperator):
    """Make the previous version of a registered model its champion again; a repeated task does so once.

    Returns ``version``, ``model_uri`` and ``replaces``; emits the event of ``champion_asset``.

    :param registered_model: its name in the registry.
    :param reason: one sentence, for the event.
    """

    operator_extra_links = (ModelVersionLink(),)
    template_fields: Sequence[str] = ("registered_model", "reason")
    ui_color = "#f4e0e0"

    def __init__(self, *, registered_model: str, reason: str = "", **kwargs: Any) -> None:
        kwargs["outlets"] = [*kwargs.get("outlets", ()), PROMOTIONS]
        super().__init__(**kwargs)
        self.registered_model = registered_model
        self.reason = reason

    def work(self, context: Context) -> dict[str, Any]:
        """Roll back.

        :raises ModelError: if there is no version before.
        """
        checked_name(str(self.registered_model))
        asked = place_digest(task_key(context))  # the same for each attempt
        version, rolled_back = persist(lambda: self.registry.rollback(self.registered_model, asked))
        champion = persist(lambda: self.registry.champion(self.registered_model))
        if champion is None or champion.number != version.number:
            raise AirflowSkipException(
                f"{rolled_back.uri} was rolled back before, and others promoted since."
            )
        self._lead_to(version, context)
        self.log.info("%s is the champion again, instead of %s", version.uri, rolled_back.uri)
        outcome = {"version": version.number, "model_uri": version.uri, "replaces": rolled_back.number}
        _announce(
            context, version, {**outcome, "reason": self.reason or "rolled back", "mlflow_run_id": None}
        )
        return outcome


def _announce(context: Context, version: Version, extra: dict[str, Any]) -> None:
    """Emit the event that downstream DAGs are scheduled on."""
    context["outlet_events"][PROMOTIONS].add(champion_asset(version.name), extra=extra)
