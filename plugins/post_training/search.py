"""A search's trials in one durable study, which workers share that may die at any time. Optuna is imported
only when it is used.

A trial belongs to the worker that begins it, from the moment in which it is made: the worker's next attempt
takes it over. What has ended is never begun again, and no more trials begin than the search may have, however
many workers ask at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
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
    suggest,
)

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

WORKER, RUN, ERROR, ATTEMPTS, DATA = "worker", "mlflow_run_id", "error", "attempts", "data"
"""Attributes of a trial; the last are the digests of what it read."""

JOB, BEGUN, FIRST_TRIAL = "job_run_id", "begun_at", "first_trial_at"
"""Attributes of a study: the job's run, when it was planned, and when its first trial began."""


class NoSearchError(PostTrainingError):
    """The storage holds no study of this name."""


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

    def begin(self, job_run_id: str, clock: Callable[[], float] = time.time) -> Search:
        """Make the study, or find it.

        One that has nothing left to try and no trial that succeeded begins anew: whoever asks again has
        changed something. So does that of another run: what it holds is what the job was before.

        :param job_run_id: the job's run in MLflow.
        """
        with optuna_answers():
            import optuna

            self._connect()
            made = partial(
                optuna.create_study,
                storage=self._storage,
                study_name=self.name,
                direction=self.config.to,
                pruner=self._pruner,
            )
            self._study = made(load_if_exists=True)
            of_another = self._study.user_attrs.get(JOB, job_run_id) != job_run_id
            if of_another or (self._is_spent(clock()) and self.best() is None):
                optuna.delete_study(study_name=self.name, storage=self._storage)
                self._study = made()
            self._study.set_user_attr(JOB, job_run_id)
            if BEGUN not in self._study.user_attrs:
                self._study.set_user_attr(BEGUN, clock())
            self._note_id()
        return self

    def open(self) -> Search:
        """Find the study.

        :raises NoSearchError: if it was not begun.
        """
        with optuna_answers():
            self._connect()
            try:
                self._study = self._loaded()
                self._note_id()
            except KeyError:
                raise NoSearchError(
                    f"[post_training] search_storage holds no search {self.name!r}; where workers are"
                    " several machines it must be a database that all of them reach."
                ) from None
        return self

    def _connect(self) -> None:
        self._storage = open_storage(self._storage_url)

    def _loaded(self, sampler: BaseSampler | None = None) -> Study:
        """Return the study as it is now: each such object keeps what it has once read."""
        import optuna

        return optuna.load_study(
            study_name=self.name, storage=self._storage, sampler=sampler, pruner=self._pruner
        )

    def _note_id(self) -> None:
        self.id = f"{self.name}/{self._study.user_attrs[BEGUN]}"

    def next_trial(self, worker: int, clock: Callable[[], float] = time.time) -> Trial | None:
        """Return a worker's unfinished trial, or begin one; None where none is left to begin."""
        with optuna_answers():
            left = self._left_behind(worker)
            if left is not None:
                return self._chosen(left, worker)
            if len(self._frozen()) >= self.config.n_trials or self._is_late(clock()):
                return None
            if FIRST_TRIAL not in self._study.user_attrs:
                self._study.set_user_attr(FIRST_TRIAL, clock())
            return self._chosen(self._made_for(worker), worker)

    def _made_for(self, worker: int) -> FrozenTrial:
        """Make a trial that has its owner from the first moment, and no values yet."""
        from optuna.trial import create_trial

        draft = create_trial(state=states().RUNNING, user_attrs={WORKER: worker})
        study_id = self._storage.get_study_id_from_name(self.name)
        return self._storage.get_trial(self._storage.create_new_trial(study_id, draft))

    def _chosen(self, made: FrozenTrial, worker: int) -> Trial | None:
        """Choose the values that a trial lacks; None where others were faster and it is one too many."""
        import optuna

        if made.number >= self.config.n_trials:
            self._study.tell(made.number, state=states().FAIL)
            return None
        if made.params.keys() != self._distributions.keys():
            study = self._loaded(self._sampler(f"{worker}/{made.number}"))
            handle = optuna.Trial(study, made._trial_id)
            for path, distribution in self._distributions.items():
                suggest(handle, path, distribution)
        return self.trial(made.number)

    def _left_behind(self, worker: int) -> FrozenTrial | None:
        """Return the trial that an attempt before has begun and not ended."""
        of_worker = (one for one in self._frozen() if one.user_attrs.get(WORKER) == worker)
        return next((one for one in of_worker if one.state == states().RUNNING), None)

    def _is_late(self, now: float) -> bool:
        """Whether no further trial begins since the first one began too long ago."""
        late, first = self.config.timeout_seconds, self._study.user_attrs.get(FIRST_TRIAL)
        return late is not None and first is not None and now - first >= late

    def note(self, trial: Trial, **attributes: Any) -> None:
        """Keep attributes of a trial."""
        with optuna_answers():
            self._set(trial.number, attributes)
        trial.attributes.update(attributes)

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """Report the metric at an epoch's end; return whether the trial is to be stopped.

        What was reported before stays, and is decided on again: the answer may have been lost.
        """
        with optuna_answers():
            handle = self._handle(trial.number)
            if epoch not in trial.reported:
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

    def data(self) -> Any:
        """Return what the finished trials have read, None before there is one that says it."""
        finished = (trial for trial in self.trials() if trial.state == "COMPLETE")
        return next(filter(None, (trial.attributes.get(DATA) for trial in finished)), None)

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

    def spent(self, clock: Callable[[], float] = time.time) -> bool:
        """Whether all trials that may begin have ended."""
        with optuna_answers():
            return self._is_spent(clock())

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

    def _is_spent(self, now: float) -> bool:
        trials = [one for one in self._frozen() if one.number < self.config.n_trials]
        all_begun = len(trials) == self.config.n_trials or self._is_late(now)
        return all_begun and all(one.state.is_finished() for one in trials)

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
