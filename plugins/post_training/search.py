"""A search's trials in one durable study, which workers share that may die at any time. Optuna is imported
only when it is used.

A trial belongs to the worker that began it: the worker's next attempt takes it over. What has ended is never
begun again, and no more trials begin than the search may have, however many workers ask at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from post_training.errors import PostTrainingError
from post_training.schemas.requests import AnyTrainingRequest
from post_training.schemas.search import CategoricalSpace, SearchConfig, choice_name
from post_training.search_parts import (
    distributions_of,
    open_storage,
    optuna_answers,
    pruner_of,
    sampler_of,
    states,
)

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

WORKER, RUN, ERROR, ATTEMPTS, STARTED = "worker", "mlflow_run_id", "error", "attempts", "started_at"
"""Attributes of a trial, and the last of a study."""

ORPHAN_SECONDS = 60.0
"""After so long a trial without a worker is one whose worker died in the moment in which it began."""


class NoSearchError(PostTrainingError):
    """No study of this name was begun."""


@dataclass
class Trial:
    """One trial: the values of the request's fields, and what is known of it.

    :param values: by dotted path.
    :param state: RUNNING, COMPLETE, PRUNED or FAIL.
    :param value: of the metric at its end, or the last one reported.
    :param reported: epochs whose value is known.
    """

    number: int
    values: dict[str, Any]
    state: str
    value: float | None
    attributes: dict[str, Any]
    reported: set[int] = field(default_factory=set)

    @property
    def run_id(self) -> str | None:
        """Its run in MLflow."""
        return self.attributes.get(RUN)

    @property
    def error(self) -> str | None:
        """Why it failed."""
        return self.attributes.get(ERROR)


def study_name(request: AnyTrainingRequest) -> str:
    """Return the name of a request's study: another request of the same job has another study."""
    return f"{request.job_uuid[:200]}/{request.payload_hash()[:32]}"


class Search:
    """A study of ``config``. Every method raises RecordUnavailableError when the storage fails, and may then
    be called again: a trial ends once.

    :param storage: URL of Optuna's storage.
    :param name: of the study.
    :param epochs: of the longest trial.
    """

    def __init__(self, storage: str, name: str, config: SearchConfig, epochs: int) -> None:
        self.config = config
        self.name = name
        self._storage_url = storage
        with optuna_answers():
            self._distributions = distributions_of(config)
            self._pruner = pruner_of(config, epochs)
            self._sampler = sampler_of(config, self._distributions)

    def begin(self, clock: Callable[[], float] = time.time) -> Search:
        """Make the study, or find it.

        One that has nothing left to try and no trial that succeeded begins anew: whoever asks again has
        changed something.
        """
        with optuna_answers():
            import optuna

            storage = open_storage(self._storage_url)
            direction = self.config.to
            self._study = optuna.create_study(
                storage=storage, study_name=self.name, direction=direction, load_if_exists=True
            )
            if self._is_spent() and self.best() is None:
                optuna.delete_study(study_name=self.name, storage=storage)
                self._study = optuna.create_study(storage=storage, study_name=self.name, direction=direction)
            self._study.pruner = self._pruner
            if STARTED not in self._study.user_attrs:
                self._study.set_user_attr(STARTED, clock())
        return self

    def open(self) -> Search:
        """Find the study.

        :raises NoSearchError: if it was not begun.
        """
        with optuna_answers():
            import optuna

            try:
                self._study = optuna.load_study(
                    study_name=self.name, storage=open_storage(self._storage_url), pruner=self._pruner
                )
            except KeyError:
                raise NoSearchError(f"The search {self.name!r} was not begun.") from None
        return self

    @property
    def id(self) -> str:
        """Text that tells this study from one of the same name that was begun before."""
        return f"{self.name}/{self._study.user_attrs[STARTED]}"

    def next_trial(self, worker: int, clock: Callable[[], float] = time.time) -> Trial | None:
        """Return a worker's unfinished trial, or begin one; None where none is left to begin."""
        with optuna_answers():
            left = self._left_behind(worker, clock())
            if left is not None:
                return left
            begun = len(self._frozen())
            late = self.config.timeout_seconds
            if late is not None and clock() - self._study.user_attrs[STARTED] >= late:
                return None
            if begun >= self.config.n_trials:
                return None
            self._study.sampler = self._sampler(f"{worker}/{begun}")
            number = self._study.ask(self._distributions).number
            if number >= self.config.n_trials:  # another worker was faster
                self._study.tell(number, state=states().FAIL)
                return None
            self._set(number, {WORKER: worker})
            return self.trial(number)

    def _left_behind(self, worker: int, now: float) -> Trial | None:
        """Return the trial that an attempt before has begun and not ended."""
        for frozen in self._frozen():
            if frozen.state != states().RUNNING or frozen.number >= self.config.n_trials:
                continue
            owner = frozen.user_attrs.get(WORKER)
            if owner == worker:
                return self._trial(frozen)
            started = frozen.datetime_start
            old = started is not None and now - started.timestamp() > ORPHAN_SECONDS
            if owner is None and worker == 0 and old:
                if frozen.params.keys() == self._distributions.keys():
                    self._set(frozen.number, {WORKER: worker})
                    return self._trial(frozen)
                self._study.tell(frozen.number, state=states().FAIL)
        return None

    def note(self, trial: Trial, **attributes: Any) -> None:
        """Keep attributes of a trial."""
        with optuna_answers():
            self._set(trial.number, attributes)
        trial.attributes.update(attributes)

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """Report the metric at an epoch's end; return whether the trial is to be stopped."""
        if epoch in trial.reported:
            return False
        with optuna_answers():
            handle = self._handle(trial.number)
            handle.report(value, epoch)
            trial.reported.add(epoch)
            return bool(handle.should_prune())

    def complete(self, trial: Trial, value: float | None) -> bool:
        """End a trial that was trained; return whether its metric is a number that can be compared."""
        if value is None or not math.isfinite(value):
            self.fail(trial, f"Its {self.config.metric} is no finite number.")
            return False
        with optuna_answers():
            self._study.tell(trial.number, value, skip_if_finished=True)
        return True

    def prune(self, trial: Trial) -> None:
        """End a trial that was stopped since it fell behind."""
        with optuna_answers():
            self._study.tell(trial.number, state=states().PRUNED, skip_if_finished=True)

    def fail(self, trial: Trial, error: str) -> None:
        """End a trial that failed."""
        if self.trial(trial.number).state != "RUNNING":
            return
        self.note(trial, error=error)
        with optuna_answers():
            self._study.tell(trial.number, state=states().FAIL, skip_if_finished=True)

    def close(self, error: str) -> None:
        """Fail the trials that run: their workers are gone."""
        for trial in self.trials():
            if trial.state == "RUNNING":
                self.fail(trial, error)

    def trials(self) -> list[Trial]:
        """Return all trials that were begun."""
        with optuna_answers():
            return [self._trial(one) for one in self._frozen() if one.number < self.config.n_trials]

    def trial(self, number: int) -> Trial:
        """Return one of them."""
        return next(trial for trial in self.trials() if trial.number == number)

    def best(self) -> Trial | None:
        """Return the finished trial of the best value, the first of equals; None without one."""
        finished = [trial for trial in self.trials() if trial.state == "COMPLETE"]
        sign = 1 if self.config.to == "minimize" else -1
        return min(finished, key=lambda trial: sign * float(trial.value or 0), default=None)

    @property
    def study(self) -> Study:
        """Optuna's own, for its pictures."""
        return self._study

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _is_spent(self) -> bool:
        ended = sum(one.state.is_finished() for one in self._frozen())
        return ended >= self.config.n_trials

    def _set(self, number: int, attributes: Mapping[str, Any]) -> None:
        handle = self._handle(number)
        for name, value in attributes.items():
            handle.set_user_attr(name, value)

    def _handle(self, number: int) -> Any:
        import optuna

        frozen = next(one for one in self._frozen() if one.number == number)
        return optuna.Trial(self._study, frozen._trial_id)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        intermediate = frozen.intermediate_values
        last = intermediate[max(intermediate)] if intermediate else None
        value = frozen.value if frozen.state == states().COMPLETE else last
        values = {path: self._decoded(path, value) for path, value in frozen.params.items()}
        attributes = dict(frozen.user_attrs)
        return Trial(frozen.number, values, frozen.state.name, value, attributes, set(intermediate))

    def _decoded(self, path: str, value: Any) -> Any:
        space = self.config.space[path]
        if isinstance(space, CategoricalSpace):
            return next(choice for choice in space.choices if choice_name(choice) == value)
        return value
