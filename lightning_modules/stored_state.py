"""The state that a retry goes on from, kept in the job's MLflow run for a retry on another machine."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from pydantic import ValidationError

from lightning_modules.trained import rename_whole, sha256_of
from post_training.schemas.record import ARTIFACT_RESUME, TAG_RESUME_STATE
from post_training.schemas.trainer import StoredState

_log = logging.getLogger(__name__)


class StateStore:
    """One state at a time: a tag of the run names the newest that is complete.

    The state itself is one of torch's files, which is only ever read with ``weights_only``.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str, run_id: str) -> None:
        self._client = client
        self._tracking_uri = tracking_uri
        self._run_id = run_id

    def upload(self, file: Path) -> str:
        """Store a file beside the newest state, and return its path below the run's artifacts.

        :raises Exception: whatever MLflow's client raises.
        """
        self._client.log_artifact(self._run_id, str(file), ARTIFACT_RESUME)
        return f"{ARTIFACT_RESUME}/{file.name}"

    def announce(self, state: StoredState) -> None:
        """Make a stored file the newest state, and delete all others.

        :raises Exception: whatever MLflow's client raises; the state before is then still there.
        """
        self._client.set_tag(self._run_id, TAG_RESUME_STATE, state.model_dump_json())
        self._delete_all_but(state.path)

    def newest(self) -> StoredState | None:
        """Return what the run says of its newest state; None where there is none that can be read.

        :raises Exception: whatever MLflow's client raises.
        """
        text = self._client.get_run(self._run_id).data.tags.get(TAG_RESUME_STATE)
        if not text:
            return None
        try:
            return StoredState.model_validate_json(text)
        except ValidationError:  # somebody has edited the tag
            _log.warning("the run's tag %s names no state: %s", TAG_RESUME_STATE, text)
            return None

    def has(self, *, step: int, inputs: str) -> bool:
        """Whether the run has a training's state of this step or a later one, from whatever machine.

        :raises Exception: whatever MLflow's client raises.
        """
        newest = self.newest()
        return newest is not None and newest.inputs == inputs and newest.step >= step

    def download(self, state: StoredState, target: Path) -> bool:
        """Put a stored state into a file, complete or not at all; say whether it was there and whole.

        :raises Exception: whatever MLflow's client raises while it does not answer.
        """
        stored = self._client.list_artifacts(self._run_id, ARTIFACT_RESUME)
        if all(file.path != state.path for file in stored):  # downloading fails alike in an outage
            _log.warning("the state in MLflow at step %d is gone", state.step)
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            file = Path(self._client.download_artifacts(self._run_id, state.path, folder))
            if sha256_of(file) != state.sha256:
                _log.warning("the state in MLflow at step %d is damaged and not used", state.step)
                return False
            rename_whole(file, target)
        return True

    def _delete_all_but(self, path: str) -> None:
        """Delete the state before, and what killed attempts have uploaded and not announced."""
        try:
            for file in self._client.list_artifacts(self._run_id, ARTIFACT_RESUME):
                if file.path != path:
                    self._repository.delete_artifacts(file.path)  # type: ignore[no-untyped-call]
        except Exception as error:  # a file too many; the next state or the job's end removes it
            _log.warning("MLflow did not delete the states before %s: %s", path, error)

    @property
    def _repository(self) -> ArtifactRepository:
        uri = self._client.get_run(self._run_id).info.artifact_uri
        return get_artifact_repository(uri, tracking_uri=self._tracking_uri)
