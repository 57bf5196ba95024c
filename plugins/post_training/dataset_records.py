"""Registered data sets in MLflow, which the api-server and all workers share: one run for each version.

The tag with the data set's id is written last: a version is complete, or nobody finds it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from post_training.errors import PostTrainingError, RecordUnavailableError
from post_training.schemas.base import load_json
from post_training.schemas.datasets import DatasetPurpose, Metadata, SourceType
from post_training.tracking import Tracking, answers, of_every_page

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

TAG_ID = "post_training.dataset_id"
TAG_DIGEST = "post_training.dataset_digest"
TAG_PURPOSE = "post_training.dataset_purpose"
TAG_TYPE = "post_training.dataset_type"
TAG_METADATA = "post_training.dataset_metadata"
TAG_URI = "post_training.dataset_uri"

_PAGE_RUNS = 1000


@dataclass(frozen=True)
class DatasetFile:
    """Rows that are kept in MLflow: the file's name, whose suffix says its kind, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class NewVersion:
    """A version to store.

    :param digest: SHA-256 of the file, or of the URI, in hexadecimal digits.
    :param type: how the source was sent.
    :param content: the rows' file, or the URI that they are read from.
    """

    dataset_id: str
    digest: str
    purpose: DatasetPurpose
    type: SourceType
    metadata: Mapping[str, Any]
    content: DatasetFile | str


@dataclass(frozen=True)
class DatasetVersion:
    """A version as it is stored.

    :param uri: what a trainer reads: the URI that was registered, or ``runs:/RUN_ID/NAME``.
    """

    run_id: str
    dataset_id: str
    digest: str
    purpose: DatasetPurpose
    type: SourceType
    metadata: Metadata
    uri: str
    created_at: datetime


_STORED = TypeAdapter(DatasetVersion)


class DatasetRecords:
    """Reads and writes the versions. Every method raises RecordUnavailableError when MLflow fails.

    :param tracking: makes the access to MLflow; called anew for each use.
    """

    def __init__(self, tracking: Callable[[], Tracking]) -> None:
        self._tracking = tracking

    def add(self, new: NewVersion) -> DatasetVersion:
        """Store a version, which is then the data set's current one; on an error there is none."""
        tracking = self._tracking()
        client = tracking.client
        tags = {
            TAG_DIGEST: new.digest,
            TAG_PURPOSE: new.purpose,
            TAG_TYPE: new.type,
            TAG_METADATA: json.dumps(new.metadata),
        }
        with answers():
            experiment_id = tracking.experiment(_experiment(tracking)).experiment_id
            run = client.create_run(experiment_id, tags=tags, run_name=new.dataset_id)
        run_id = run.info.run_id
        try:
            with answers():
                client.set_tag(run_id, TAG_URI, _keep(client, run_id, new.content))
                client.set_terminated(run_id)
                client.set_tag(run_id, TAG_ID, new.dataset_id)
                return _version(client.get_run(run_id))
        except PostTrainingError:
            with suppress(RecordUnavailableError), answers():
                client.delete_run(run_id)
            raise

    def find(self, dataset_id: str, digest: str | None = None) -> DatasetVersion | None:
        """Return a data set's current version, or its newest one whose digest starts so.

        :param dataset_id: one that ``schemas.datasets.check_dataset_id`` passes.
        :param digest: hexadecimal digits.
        """
        pinned = f" AND tags.`{TAG_DIGEST}` LIKE '{digest}%'" if digest is not None else ""
        return next(self._search(f"tags.`{TAG_ID}` = '{dataset_id}'{pinned}", page=1), None)

    def uri(self, dataset_id: str, digest: str | None = None) -> str | None:
        """Return what a trainer reads of the version that :meth:`find` returns."""
        version = self.find(dataset_id, digest)
        return version.uri if version is not None else None

    def current(self) -> list[DatasetVersion]:
        """Return all data sets in their current versions, the newest first."""
        newest: dict[str, DatasetVersion] = {}
        for version in self._search(f"tags.`{TAG_ID}` != ''"):
            newest.setdefault(version.dataset_id, version)
        return list(newest.values())

    def rows(self, version: DatasetVersion) -> list[dict[str, Any]]:
        """Return the rows of a version that was registered as rows."""
        name = version.uri.rpartition("/")[2]
        with TemporaryDirectory() as folder, answers():
            path = self._tracking().client.download_artifacts(version.run_id, name, folder)
            return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]

    def delete(self, dataset_id: str) -> bool:
        """Delete all versions, the current one last; return whether there was one.

        Jobs that read a version keep it: MLflow answers for a deleted run until it is collected.
        """
        client = self._tracking().client
        versions = list(self._search(f"tags.`{TAG_ID}` = '{dataset_id}'"))
        for version in reversed(versions):
            with answers():
                client.delete_run(version.run_id)
        return bool(versions)

    def _search(self, condition: str, page: int = _PAGE_RUNS) -> Iterator[DatasetVersion]:
        """Yield the versions, the newest first."""
        tracking = self._tracking()
        with answers():
            experiment = tracking.client.get_experiment_by_name(_experiment(tracking))
        if experiment is None:
            return
        search = partial(
            tracking.client.search_runs,
            [experiment.experiment_id],
            condition,
            max_results=page,
            order_by=["attributes.start_time DESC"],
        )
        yield from _versions(of_every_page(search))


def _experiment(tracking: Tracking) -> str:
    return f"{tracking.server.experiment}-datasets"


def _keep(client: MlflowClient, run_id: str, content: DatasetFile | str) -> str:
    """Upload a file of rows; return the URI to read."""
    if isinstance(content, str):
        return content
    with TemporaryDirectory() as folder:
        path = Path(folder, content.name)
        path.write_bytes(content.content)
        client.log_artifact(run_id, str(path))
    return f"runs:/{run_id}/{content.name}"


def _versions(runs: Iterable[Run]) -> Iterator[DatasetVersion]:
    """Yield the versions among these runs: whoever writes to MLflow can make other ones with our tags."""
    for run in runs:
        try:
            version = _version(run)
        except (KeyError, ValueError) as error:
            logger.warning("The run %s is no version of a data set: %s", run.info.run_id, error)
        else:
            yield version


def _version(run: Run) -> DatasetVersion:
    """Read a version.

    :raises KeyError: if a tag is missing.
    :raises ValueError: if a tag holds what we do not write.
    """
    tags = run.data.tags
    return _STORED.validate_python(
        {
            "run_id": run.info.run_id,
            "dataset_id": tags[TAG_ID],
            "digest": tags[TAG_DIGEST],
            "purpose": tags[TAG_PURPOSE],
            "type": tags[TAG_TYPE],
            "metadata": load_json(tags[TAG_METADATA]),
            "uri": tags[TAG_URI],
            "created_at": datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        }
    )
