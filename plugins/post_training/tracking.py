"""The job's record in MLflow, through which all of the plugin reaches mlflow, imported when it is used."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from post_training.checkpoints import recorded_checkpoints
from post_training.errors import InvalidRequestError, PostTrainingError, RecordUnavailableError
from post_training.job_ids import MAY_BE_AN_ID, TaskKey, job_uuid_of
from post_training.places import may_be_used
from post_training.record import identity_tags
from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel, Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.entities.paged_list import PagedList

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

MAX_PARAM_LENGTH = 6_000
"""MLflow cuts longer values in silence."""

_EXPERIMENT_KIND = "mlflow.experimentKind"
"""Without it MLflow's pages show the experiment as one of traces and prompts."""

_DEFAULT_EXPERIMENT = "0"
"""Its id: MLflow makes it itself."""

_RUN_ID = re.compile(r"[0-9a-f]{32}")

_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "INVALID_STATE"})
"""MLflow's words for what asking again would not change; BAD_REQUEST is also said of its database."""

CLIENT_SETTINGS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own defaults repeat a failed call for minutes; and what was answered too late is done twice.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}

SUPERSEDED = " (superseded)"
"""Behind the job's id of a run that another has taken the place of."""

OPEN = ("SCHEDULED", "RUNNING")
TERMINAL = frozenset({"FINISHED", "FAILED", "KILLED"})


@dataclass(frozen=True)
class TrackingServer:
    """Where MLflow is and how to enter it.

    :param public_url: its address in a browser.
    :param deployment: which Airflow it is that writes here; others' jobs are left alone. Empty is unknown.
    :param roots: folders of this machine in which experiments that a request names may store.
    """

    uri: str
    experiment: str = "post-training"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    public_url: str | None = None
    deployment: str = ""
    roots: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return the variables by which an MLflow client finds the credentials."""
        pairs = {"MLFLOW_TRACKING_USERNAME": self.username, "MLFLOW_TRACKING_PASSWORD": self.password}
        return {name: value for name, value in pairs.items() if value}

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """Return the address of a run's page."""
        return f"{self._base}/#/experiments/{experiment_id}/runs/{run_id}"

    def checkpoint_url(self, experiment_id: str, path: str) -> str | None:
        """Return the address of a checkpoint's files, None where it is a folder and no logged model."""
        scheme, _, model_id = path.partition(":/")
        if scheme != "models":
            return None
        return f"{self._base}/#/experiments/{experiment_id}/models/{quote(model_id, safe='')}/artifacts"

    def version_url(self, name: str, number: int) -> str:
        """Return the address of a registered model's version."""
        return f"{self._base}/#/models/{quote(name, safe='')}/versions/{number}"

    @property
    def _base(self) -> str:
        return (self.public_url or self.uri).rstrip("/")


@dataclass(frozen=True)
class JobRun:
    """What MLflow holds of one job. Times are UTC."""

    run_id: str
    experiment_id: str
    status: str
    created_at: datetime
    ended_at: datetime | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def completed(self) -> bool:
        """Whether its task has completed it; whoever opens a run in a notebook writes FINISHED, too."""
        return self.status == "FINISHED" and names.TAG_MAX_TRIES in self.tags


class Tracking:
    """Reads and writes the runs of jobs. Every method raises RecordUnavailableError when MLflow fails;
    why is logged, since it names hosts.

    :param server: the tracking server.
    """

    def __init__(self, server: TrackingServer) -> None:
        self.server = server

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's own client, logged in; its calls belong inside :func:`answers`."""
        os.environ.update(self.server.environment())
        for name, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.server.uri)

    def ping(self) -> None:
        """Ask the server for one experiment."""
        with answers():
            self.client.search_experiments(max_results=1)

    def create_run(
        self,
        *,
        name: str,
        experiment: str | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        request: dict[str, Any],
    ) -> JobRun:
        """Make a SCHEDULED run that holds the request.

        Its tags come last, and with them the job's id: what an outage leaves of it is no job's run, and is
        deleted now or when all open runs are reconciled.

        :param experiment: the experiment's name; None is the server's default.
        :raises InvalidRequestError: if it stores where nothing may be written, or MLflow refuses it.
        """
        with answers("logger_config"):
            found = self.experiment_for(experiment)
            whose = {names.TAG_DAG_ID} & tags.keys()
            draft = {names.TAG_METHOD: "", **{key: tags[key] for key in whose}}
            if self.server.deployment:
                draft[names.TAG_DEPLOYMENT] = self.server.deployment
            run = self.client.create_run(found.experiment_id, tags=draft, run_name=name)
        run_id = run.info.run_id
        try:
            with answers("logger_config"):
                self.client.update_run(run_id, status="SCHEDULED")
                self._log_request(run, request)
                self._log_params(run_id, params, tags)
        except PostTrainingError:
            with suppress(RecordUnavailableError):
                self.discard(run_id)
            raise
        made = job_run(run)
        written = {key: _param(value) for key, value in params.items()}
        return replace(made, status="SCHEDULED", tags={**made.tags, **tags}, params=written)

    def _log_request(self, run: Run, request: dict[str, Any]) -> None:
        """Upload the request; by the client's own method it would cost one more call for the run."""
        with TemporaryDirectory() as folder:
            file = Path(folder, names.ARTIFACT_REQUEST)
            file.write_text(json.dumps(request, indent=2), encoding="utf-8")
            self._artifacts(run).log_artifact(str(file))  # type: ignore[no-untyped-call]

    def _artifacts(self, run: Run) -> ArtifactRepository:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(run.info.artifact_uri, tracking_uri=self.server.uri)

    def experiment(self, name: str) -> Experiment:
        """Return an experiment by its name; it is made if it is not there."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found
        try:
            made = self.client.create_experiment(name, tags={_EXPERIMENT_KIND: "custom_model_development"})
        except MlflowException:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return found
        return self.client.get_experiment(made)

    def experiment_for(self, name: str | None) -> Experiment:
        """Return the experiment that a new run goes to; its calls belong inside :func:`answers`.

        :param name: None is the server's default.
        :raises InvalidRequestError: if it stores where nothing may be written.
        """
        found = self.experiment(name or self.server.experiment)
        if name is not None:
            self._check_place(found)
        return found

    def _check_place(self, experiment: Experiment) -> None:
        """Refuse an experiment that somebody has made to store where they like, on the disks of who uses it.

        Where MLflow itself places experiments is the deployment's choice: beside the default one, whose place
        no client can choose.

        :raises InvalidRequestError: if it stores elsewhere on this machine and under no root.
        """
        location = experiment.artifact_location
        if experiment.name == self.server.experiment or may_be_used(location, self.server.roots):
            return
        if not may_be_used(location, self._beside_default()):
            raise InvalidRequestError.of(
                "logger_config.experiment_name",
                "must not name an experiment that stores in a folder outside [post_training] allowed_roots,"
                f" got {experiment.name[:200]!r}",
            )

    def _beside_default(self) -> list[Path]:
        """Return the folder in which MLflow places experiments; none where that is not on disks like ours."""
        default = _known(lambda: self.client.get_experiment(_DEFAULT_EXPERIMENT))
        place = urlsplit(default.artifact_location) if default is not None else None
        return [Path(unquote(place.path)).parent] if place and place.scheme in ("", "file") else []

    def _log_params(
        self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None
    ) -> None:
        """Write params, and the tags with the last of them."""
        from mlflow.entities import Param, RunTag

        entries = [Param(key, _param(value)) for key, value in params.items()]
        pages = [entries[start : start + 100] for start in range(0, len(entries), 100)] or [[]]
        for page in pages[:-1]:
            self.client.log_batch(run_id, params=page)
        own = [RunTag(key, value) for key, value in (tags or {}).items()]
        self.client.log_batch(run_id, params=pages[-1], tags=own)

    def add_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Write the params that the run does not have yet; MLflow refuses to change one."""
        with answers():
            present = self.client.get_run(run_id).data.params
            self._log_params(run_id, {key: value for key, value in params.items() if key not in present})

    def add_file(self, run_id: str, path: Path, folder: str) -> None:
        """Upload a file into a folder of the run's artifacts."""
        with answers():
            self.client.log_artifact(run_id, str(path), folder)

    def delete_files(self, run_id: str, files: Collection[str]) -> None:
        """Delete files among the run's artifacts, if their store can."""
        with answers(), suppress(NotImplementedError):
            artifacts = self._artifacts(self.client.get_run(run_id))
            for file in files:
                artifacts.delete_artifacts(file)  # type: ignore[no-untyped-call]

    def discard(self, run_id: str) -> None:
        """Delete a run that no job came to use."""
        with answers():
            self.client.delete_run(run_id)

    def forget_state(self, run_id: str) -> None:
        """Delete the state that a retry would have gone on from."""
        with answers():
            run = self.client.get_run(run_id)
            if names.TAG_RESUME_STATE not in run.data.tags:
                return
            with suppress(NotImplementedError):  # not every store can delete
                self._artifacts(run).delete_artifacts(names.ARTIFACT_RESUME)  # type: ignore[no-untyped-call]
            self.client.delete_tag(run_id, names.TAG_RESUME_STATE)

    def unsettled_runs(self, killed_since: datetime) -> list[JobRun]:
        """Return every run of a job, or of one that was to be, that has not ended, or was killed since then.

        The task of a killed one may still be there to be stopped. Beside them, every run of a task that is no
        job (``StageRuns``) that has not ended.
        """
        killed = f"status = 'KILLED' AND attributes.end_time >= {int(killed_since.timestamp() * 1000)}"
        filters = [*(f"status = '{status}'" for status in OPEN), killed]
        with answers():
            experiments = self.experiment_ids()
            runs = [job_run(run) for wanted in filters for run in self._runs(experiments, wanted)]
        return [run for run in runs if _is_unsettled(run) and self._is_ours(run)]

    def find(self, job_uuid: str) -> JobRun | None:
        """Return the job's run, or None.

        It is that of the newest attempt; before there is any, the newest that supersedes another, else the
        oldest.
        """
        if not MAY_BE_AN_ID.fullmatch(job_uuid):  # nor is it anything but text to MLflow's filter language
            return None
        with answers():
            of_this_id = f"tags.`{names.TAG_JOB_UUID}` = '{job_uuid}'"
            oldest_first = ["attributes.start_time ASC"]
            runs = map(job_run, self._runs(self.experiment_ids(), of_this_id, oldest_first))
            return max(filter(self._is_ours, runs), key=precedence, default=None)

    def successor(self, run_id: str) -> JobRun | None:
        """Return the run that supersedes another, the newest if there are several, or None."""
        return next(self.tagged(names.TAG_SUPERSEDES, run_id), None)

    def tagged(self, tag: str, value: str) -> Iterator[JobRun]:
        """Yield our runs with a tag, newest first.

        :param value: without quotes.
        """
        with answers():
            newest_first = ["attributes.start_time DESC"]
            runs = map(job_run, self._runs(self.experiment_ids(), f"tags.`{tag}` = '{value}'", newest_first))
            yield from filter(self._is_ours, runs)

    def get(self, run_id: str) -> JobRun | None:
        """Return a run by its id, None where it does not exist or was deleted."""
        if not is_run_id(run_id):  # it comes from a DAG run's conf, in which anything may stand
            return None
        with answers():
            run = _known(lambda: self.client.get_run(run_id))
        return job_run(run) if run is not None and run.info.lifecycle_stage == "active" else None

    def _is_ours(self, run: JobRun) -> bool:
        """Whether a run is of this Airflow, as far as both are known: others may share the server."""
        ours, its = self.server.deployment, run.tags.get(names.TAG_DEPLOYMENT)
        return not its or ours == its or (not ours and its != names.NO_DEPLOYMENT)

    def experiment_ids(self) -> list[str]:
        """Return the ids of all experiments, of every page."""
        found = of_every_page(self.client.search_experiments)
        return [experiment.experiment_id for experiment in found]

    def _runs(self, experiments: list[str], wanted: str, order_by: list[str] | None = None) -> Iterator[Run]:
        """Yield the runs that a filter finds, of every page."""
        search = partial(self.client.search_runs, experiments, wanted, max_results=1000, order_by=order_by)
        return of_every_page(search)

    def set_status(
        self, run_id: str, status: str, *, error: str | None = None, ended_at: datetime | None = None
    ) -> None:
        """Write the run's status, and the one sentence that says why it failed.

        :param status: SCHEDULED, RUNNING, FINISHED, FAILED or KILLED.
        :param ended_at: when it ended, if that was not now.
        """
        with answers():
            if error is not None:
                self.client.set_tag(run_id, names.TAG_ERROR, error)
            if status in TERMINAL:
                milliseconds = int(ended_at.timestamp() * 1000) if ended_at is not None else None
                self.client.set_terminated(run_id, status=status, end_time=milliseconds)
            else:
                self.client.update_run(run_id, status=status)
            if status not in ("FAILED", "KILLED"):
                self._forget_error(run_id)

    def _forget_error(self, run_id: str) -> None:
        """Remove the reason of an earlier attempt's failure from a run that goes on."""
        if names.TAG_ERROR in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, names.TAG_ERROR)

    def forget_tags(self, run_id: str, tags: Collection[str]) -> None:
        """Remove tags of a run; those that it does not have are none."""
        with answers():
            for tag in self.client.get_run(run_id).data.tags.keys() & set(tags):
                self.client.delete_tag(run_id, tag)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Write tags of a run."""
        from mlflow.entities import RunTag

        with answers():
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def checkpoints(self, run: JobRun) -> list[Checkpoint]:
        """Return the run's finished checkpoints by epoch: models, and copies of epochs that have none."""
        with answers():
            models = self._logged_models(run)
        return recorded_checkpoints(run.tags, models)

    def _logged_models(self, run: JobRun) -> list[LoggedModel]:
        """Return the run's logged models of every page, oldest first."""
        search = partial(
            self.client.search_logged_models,
            experiment_ids=[run.experiment_id],
            filter_string=f"source_run_id = '{run.run_id}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": True}],
        )
        return list(of_every_page(search))


def of_every_page(search: Callable[..., PagedList[_T]]) -> Iterator[_T]:
    """Yield what one of the client's searches finds, page by page.

    :raises RecordUnavailableError: whichever page MLflow does not answer.
    """
    token: str | None = None
    while True:
        with answers():
            page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _param(value: Any) -> str:
    return str(value)[:MAX_PARAM_LENGTH]


def is_run_id(text: str) -> bool:
    """Whether a text has the form of a run's id."""
    return _RUN_ID.fullmatch(text) is not None


def run_of_task(tracking: Tracking, key: TaskKey, submitted: Any) -> JobRun | None:
    """Return the run of this very task: ids are made of names, and two tasks' names may add up to one.

    :param submitted: id of the run that was made at submit, from a DAG run's conf: anything may stand there.
    """
    looks: tuple[Callable[[], JobRun | None], ...] = (
        lambda: tracking.get(submitted) if isinstance(submitted, str) else None,
        lambda: tracking.find(job_uuid_of(key)),
    )
    found = (look() for look in looks)
    return next((run for run in found if run and identity_tags(key).items() <= run.tags.items()), None)


def _known(look: Callable[[], _T]) -> _T | None:
    """Return what the client finds, None where MLflow has nothing of that id."""
    from mlflow.exceptions import MlflowException

    try:
        return look()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


@contextmanager
def answers(field: str | None = None) -> Iterator[None]:
    """Turn every failure of the server into the one error that callers know.

    :param field: of the request, that is to blame where the server calls what it is given invalid.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException  # noqa: PLC0415

    try:
        yield
    except (MlflowException, RequestException, OSError) as error:
        first_line = str(error).partition("\n")[0][:200]
        if field and isinstance(error, MlflowException) and error.error_code in _REFUSALS:
            raise InvalidRequestError.of(field, f"MLflow refuses it: {first_line}") from error
        logger.warning("MLflow does not answer: %s", first_line)
        raise RecordUnavailableError("MLflow does not answer") from error


def _is_unsettled(run: JobRun) -> bool:
    """Whether a run is a job's; or, if it is open, a stage's."""
    return names.TAG_METHOD in run.tags or (names.TAG_STAGE in run.tags and run.status in OPEN)


def job_run(run: Run) -> JobRun:
    """Return what MLflow's client has read of a run."""
    ended = run.info.end_time
    return JobRun(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        created_at=_time(run.info.start_time),
        ended_at=_time(ended) if ended and run.info.status in TERMINAL else None,
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        params=dict(run.data.params),
    )


def precedence(run: JobRun) -> tuple[str, datetime]:
    """Return what is greatest in the job's run among those that bear its id, and in the first of equals."""
    supersedes = names.TAG_SUPERSEDES in run.tags
    return run.tags.get(names.TAG_ATTEMPT_ID, ""), run.created_at if supersedes else _time(0)


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def let_go(tracking: Tracking, run: JobRun, status: str) -> None:
    """Say of a job that has ended badly that nobody follows its trainer on a Ray cluster, which then stops.

    :param status: how the run ends.
    """
    if status in ("FAILED", "KILLED") and run.tags.get(names.TAG_FOLLOWED):
        tracking.set_tags(run.run_id, {names.TAG_FOLLOWED: ""})
