"""The operator that measures models side by side on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.errors import InvalidRequestError
from post_training.job_ids import TaskKey
from post_training.launch.local import EVALUATE
from post_training.model_registry import ModelRegistry
from post_training.operators.spec import resolver_of
from post_training.operators.stage import StageOperator, checked, parsed, said
from post_training.operators.worker import work_dir_of
from post_training.schemas.evaluation import (
    EVALUATION_RESULT_FILE,
    EVALUATION_SPEC_FILE,
    EvaluationRequest,
    EvaluationResult,
    EvaluationSpec,
)
from post_training.schemas.trainer import CACHE_FOLDER, TrackingTarget
from post_training.settings import load_settings
from post_training.tracking import JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context

CHAMPION_NAME = "champion"


class EvaluateOperator(StageOperator):
    """Measure loss, perplexity, exact matches and rewards of models, each on the same held-out examples.

    Returns ``mlflow_run_id``, ``models`` (name -> what was measured, an alias as the version that it was),
    ``champion`` (its version's number, null without one) and ``metrics`` (name -> metric -> value). The run
    holds a table, a picture, sample answers and the values of each example.

    :param models: name in the tables -> hub id, path under an allowed root, or MLflow URI. Rewards are
        relative to the first.
    :param config: what is measured (``EvaluationConfig``).
    :param champion_of: registered model whose champion is measured too, as ``champion``, if there is one; if
        that came from the parent run, the one before it.
    """

    template_fields: Sequence[str] = ("models", "config", "champion_of", "parent_run_id", "experiment_name")
    template_fields_renderers: ClassVar[dict[str, str]] = {"models": "json", "config": "json"}
    ui_color = "#e8ecf4"

    def __init__(
        self,
        *,
        models: Mapping[str, str] | str,
        config: Mapping[str, Any] | str,
        champion_of: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.models = models
        self.config = config
        self.champion_of = champion_of

    def work(self, context: Context, key: TaskKey, run: JobRun) -> dict[str, Any]:
        """Resolve the models, measure them, and return what came of it.

        :raises PostTrainingError: if something cannot be had or measured.
        """
        given = {"models": parsed(self.models, "models"), "config": parsed(self.config, "config")}
        request = checked(EvaluationRequest, given, "")
        champion_of = said(self.champion_of)
        if champion_of is not None and CHAMPION_NAME in request.models:
            raise InvalidRequestError.of(
                f"models.{CHAMPION_NAME}", f"must be left out: champion_of {champion_of!r} is measured so"
            )
        registry = ModelRegistry(self.tracking)
        champion = None
        if champion_of is not None:
            champion = self.persist(registry.opponent, champion_of, said(self.parent_run_id))
        resolver = resolver_of(self.tracking)
        models = {
            name: self.persist(registry.pinned, resolver.model_named(f"models.{name}", model))
            for name, model in request.models.items()
        }
        if champion is not None:
            models[CHAMPION_NAME] = champion.uri
        result = self._measure(key, run, request, models)
        return {
            "mlflow_run_id": run.run_id,
            "models": models,
            "champion": champion.number if champion is not None else None,
            "metrics": result.metrics,
        }

    def _measure(
        self, key: TaskKey, run: JobRun, request: EvaluationRequest, models: dict[str, str]
    ) -> EvaluationResult:
        settings, resolver, config = load_settings(), resolver_of(self.tracking), request.config
        work_dir = work_dir_of(key)
        pairs = config.preference_dataset_id
        spec = EvaluationSpec(
            config=config,
            models=models,
            data=self.persist(resolver.dataset, "config.dataset_id", config.dataset_id),
            preference_data=None
            if pairs is None
            else self.persist(resolver.dataset, "config.preference_dataset_id", pairs),
            model_roots=resolver.model_roots(),
            work_dir=work_dir,
            max_data_bytes=settings.max_data_bytes,
            cache_dir=settings.home / CACHE_FOLDER,
            max_cache_bytes=settings.max_cache_bytes,
            tracking=TrackingTarget(tracking_uri=self.tracking.server.uri, run_id=run.run_id),
        )
        return self._run_program(
            EVALUATE, spec, work_dir / EVALUATION_SPEC_FILE, EVALUATION_RESULT_FILE, EvaluationResult
        )
