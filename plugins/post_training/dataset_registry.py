"""Register, list, get and delete data sets; every collaborator is passed in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from post_training.data_uris import parse_data_uri
from post_training.dataset_records import DatasetFile, DatasetRecords, DatasetVersion, NewVersion
from post_training.datasets import Resolver
from post_training.errors import (
    DatasetNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    RecordUnavailableError,
)
from post_training.job_ids import REQUEST_DAGS
from post_training.jobs import Access
from post_training.keyed_locks import KeyedLocks
from post_training.schemas.datasets import (
    Dataset,
    DatasetSource,
    ListDatasetsResponse,
    RegisterDatasetRequest,
    StoredSource,
    asset_uri,
    parse_reference,
)
from post_training.uris import shown

logger = logging.getLogger(__name__)

URI_FIELD = "source.uri"


class DatasetService:
    """The data sets that requests may name by an id.

    :param records: where they are kept.
    :param resolver: checks a registered URI as one in a request.
    :param announce: told the asset's URI, and about the version, when there is a new one.
    """

    def __init__(
        self,
        records: DatasetRecords,
        resolver: Resolver,
        announce: Callable[[str, dict[str, Any]], None] = lambda uri, extra: None,
    ) -> None:
        self._records = records
        self._resolver = resolver
        self._announce = announce
        self._locks = KeyedLocks()

    def register(self, request: RegisterDatasetRequest, access: Access) -> Dataset:
        """Store a data set, or a new version of it; what its current version is already is not stored again.

        :raises BusyError: if another registration under its id does not end.
        :raises ForbiddenError: if the caller may start no jobs.
        :raises InvalidRequestError: if a request could not name the URI.
        :raises RecordUnavailableError: if MLflow does not answer; nothing is left then.
        """
        _refuse_unless(access.may_trigger, f"{access.user_name} may change no data sets")
        content, digest = self._content(request.source)
        new = NewVersion(
            dataset_id=request.dataset_id or f"dataset-{digest[:16]}",
            digest=digest,
            purpose=request.purpose,
            type="rows" if request.source.uri is None else "uri",
            metadata=request.metadata or {},
            content=content,
        )
        with self._locks.hold(new.dataset_id):
            current = self._records.find(new.dataset_id)
            if current is not None and _is_same(current, new):
                return _dataset(current, request.source.rows)
            version = self._records.add(new)
        try:
            self._announce(
                asset_uri(version.dataset_id), {"dataset": f"{version.dataset_id}@{version.digest}"}
            )
        except RecordUnavailableError as unavailable:  # it is registered: a cron still wakes who waits for it
            logger.warning("No asset event of the data set %s: %s", version.dataset_id, unavailable)
        return _dataset(version, request.source.rows)

    def _content(self, source: DatasetSource) -> tuple[DatasetFile | str, str]:
        """Return what is to be stored, and its digest, for a file that which a trainer records of it."""
        uri = source.uri
        if uri is None:
            file = DatasetFile("rows.jsonl", _jsonl(source.rows or []))
        else:
            self._resolver.dataset_uri(URI_FIELD, uri)
            if not uri.lower().startswith("data:"):
                return uri, hashlib.sha256(uri.encode()).hexdigest()
            file = _file_of_data_uri(uri)
        return file, hashlib.sha256(file.content).hexdigest()

    def list(self, access: Access) -> ListDatasetsResponse:
        """Return all data sets in their current versions, without their rows.

        :raises ForbiddenError: if the caller may see no jobs.
        """
        _refuse_unless(access.may_read, f"{access.user_name} may see no data sets")
        return ListDatasetsResponse(data=[_dataset(version) for version in self._records.current()])

    def get(self, reference: str, access: Access) -> Dataset:
        """Return a data set's current version, or the one that ``ID@DIGEST`` names, with its rows.

        :raises ForbiddenError: if the caller may see no jobs.
        :raises DatasetNotFoundError: if there is none.
        """
        _refuse_unless(access.may_read, f"{access.user_name} may see no data sets")
        named = parse_reference(reference)
        version = self._records.find(*named) if named is not None else None
        if version is None:
            raise DatasetNotFoundError(reference)
        return _dataset(version, self._records.rows(version) if version.type == "rows" else None)

    def delete(self, dataset_id: str, access: Access) -> None:
        """Delete a data set, all its versions; jobs that started with it keep what they read.

        :raises ForbiddenError: if the caller may start no jobs.
        :raises DatasetNotFoundError: if there is none.
        """
        _refuse_unless(access.may_trigger, f"{access.user_name} may change no data sets")
        if parse_reference(dataset_id) != (dataset_id, None) or not self._records.delete(dataset_id):
            raise DatasetNotFoundError(dataset_id)


def _refuse_unless(may: Callable[[str], bool], sentence: str) -> None:
    """Ask for the right to one kind of job: data sets are the input of each."""
    if not any(map(may, REQUEST_DAGS)):
        raise ForbiddenError(sentence)


def _is_same(current: DatasetVersion, new: NewVersion) -> bool:
    """Whether a version is what would be stored, the kind of its file and the text of its metadata too."""
    content = new.content
    uri = content if isinstance(content, str) else f"runs:/{current.run_id}/{content.name}"
    return (current.digest, current.purpose, current.type, current.uri, _text(current.metadata)) == (
        new.digest,
        new.purpose,
        new.type,
        uri,
        _text(new.metadata),
    )


def _text(metadata: Mapping[str, Any]) -> str:
    """Return the JSON, in which true is not 1 as it is in Python."""
    return json.dumps(metadata, sort_keys=True)


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _file_of_data_uri(uri: str) -> DatasetFile:
    try:
        kind, content = parse_data_uri(uri)
    except ValueError as error:
        raise InvalidRequestError.of(URI_FIELD, f"cannot be read: {error}") from None
    return DatasetFile(f"rows.{kind}", content)


def _dataset(version: DatasetVersion, rows: list[dict[str, Any]] | None = None) -> Dataset:
    is_url = version.uri.lower().startswith("https:")
    return Dataset(
        identifier=version.dataset_id,
        provider_resource_id=version.run_id,
        purpose=version.purpose,
        source=StoredSource(type=version.type, uri=shown(version.uri) if is_url else version.uri, rows=rows),
        metadata=dict(version.metadata),
        version=version.digest,
        created_at=version.created_at,
    )
