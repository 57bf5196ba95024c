"""A search's parts in Optuna's terms, which is imported only when it is used."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from post_training.errors import PostTrainingError, RecordUnavailableError
from post_training.schemas.search import CategoricalSpace, FloatSpace, IntSpace, SearchConfig, choice_name

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import Trial

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 60
"""How long SQLite waits for another process's write."""


class SearchUnavailableError(PostTrainingError):
    """This machine lacks a library that the search needs, or its storage is none."""


@contextmanager
def optuna_answers() -> Iterator[None]:
    """Turn the storage's failures into the error that callers wait out.

    :raises RecordUnavailableError: if it does not answer; why is logged, since it names hosts.
    :raises SearchUnavailableError: if a library is missing.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415
    except ImportError as error:
        raise SearchUnavailableError(f"A search needs the extra 'search' on the worker: {error}.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        logger.warning("The search's storage does not answer: %s", error.__cause__ or error)
        raise RecordUnavailableError("The search's storage does not answer") from error


def states() -> Any:
    """Return Optuna's names of a trial's states."""
    from optuna.trial import TrialState

    return TrialState


def open_storage(url: str) -> BaseStorage:
    """Return the storage of this URL, made if it is not there.

    :raises SearchUnavailableError: if there can be none: a wrong URL, no driver, or another Optuna's tables.
    """
    from optuna.storages import RDBStorage, get_storage
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

    waits = {"connect_args": {"timeout": _LOCK_SECONDS}} if url.startswith("sqlite:") else {}
    try:
        return get_storage(RDBStorage(url, engine_kwargs=waits))  # as a study has it: it remembers trials
    except (ArgumentError, ImportError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].replace(url, "the URL")
        raise SearchUnavailableError(
            f"[post_training] search_storage cannot be used: {type(error).__name__}: {reason}"
        ) from None


def distributions_of(config: SearchConfig) -> dict[str, BaseDistribution]:
    """Return what each field's values are drawn from."""
    return {path: _distribution(space) for path, space in config.space.items()}


def suggest(trial: Trial, path: str, distribution: BaseDistribution) -> None:
    """Let a trial choose the value of one field, unless it has one."""
    from optuna import distributions as of

    if isinstance(distribution, of.FloatDistribution):
        low, high = distribution.low, distribution.high
        trial.suggest_float(path, low, high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, of.IntDistribution):
        first, last = distribution.low, distribution.high
        trial.suggest_int(path, first, last, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, of.CategoricalDistribution):
        trial.suggest_categorical(path, distribution.choices)


def _distribution(space: FloatSpace | IntSpace | CategoricalSpace) -> BaseDistribution:
    from optuna import distributions as of

    if isinstance(space, FloatSpace):
        return of.FloatDistribution(space.low, space.high, log=space.log, step=space.step)
    if isinstance(space, IntSpace):
        return of.IntDistribution(space.low, space.high, log=space.log, step=space.step)
    return of.CategoricalDistribution([choice_name(choice) for choice in space.choices])


def sampler_of(
    config: SearchConfig, distributions: dict[str, BaseDistribution]
) -> Callable[[str], BaseSampler]:
    """Return what makes the sampler that chooses a trial's values, given the trial's place in the search.

    With one seed alone, each worker and attempt would choose the same. What hangs on no trial before follows
    from the trial's number instead: it is the same on every worker, and in no two trials.

    :raises SearchUnavailableError: if a library is missing.
    """
    from optuna import samplers

    first = max(2, min(10, config.n_trials // 3))

    def tpe(place: str) -> BaseSampler:
        parallel = config.max_parallel > 1
        seed = _seed(config, place)
        return samplers.TPESampler(seed=seed, n_startup_trials=first, constant_liar=parallel)

    if config.sampler == "tpe":
        return tpe
    if config.sampler == "gp":
        if find_spec("torch") is None:  # it would fail at the first trial that learns
            raise SearchUnavailableError("The sampler gp needs torch where the search's tasks run.")
        return lambda place: samplers.GPSampler(seed=_seed(config, place), n_startup_trials=first)
    in_order = _in_order(list(_points(config, distributions)))
    return lambda place: in_order


def _seed(config: SearchConfig, place: str) -> int:
    text = json.dumps([config.seed, place]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def _points(config: SearchConfig, distributions: dict[str, BaseDistribution]) -> Iterator[dict[str, Any]]:
    """Yield the values of each trial, in a study's words."""
    import optuna

    if config.sampler == "random":
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
        for _ in range(config.n_trials):
            yield study.ask(distributions).params
        return
    columns = [
        [(path, choice_name(value) if isinstance(space, CategoricalSpace) else value) for value in values]
        for path, space in config.space.items()
        if (values := space.finite) is not None
    ]
    cells = list(itertools.product(*columns))
    random.Random(config.seed).shuffle(cells)  # noqa: S311
    yield from (dict(cell) for cell in cells[: config.n_trials])


def _in_order(points: list[dict[str, Any]]) -> BaseSampler:
    """Return a sampler that gives each trial the point of its number.

    Optuna's own queue of such points gives one to two workers at once, where SQLite stores it.
    """
    from optuna.samplers import BaseSampler

    class InOrder(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(
            self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution
        ) -> Any:
            return points[trial.number % len(points)][param_name]

    return InOrder()


def pruner_of(config: SearchConfig, epochs: int) -> BasePruner:
    """Return what decides whether a trial falls behind.

    :param epochs: of the longest trial.
    """
    from optuna import pruners

    if config.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=max(1, min(5, config.n_trials // 4)))
    if config.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource=epochs)
    return pruners.NopPruner()
