"""Data sets, over a real MLflow store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lightning_modules.data.reading import read_dataset
from post_training.dataset_records import TAG_ID, DatasetRecords
from post_training.dataset_registry import DatasetService
from post_training.errors import (
    DatasetNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    RecordUnavailableError,
)
from post_training.schemas.datasets import Dataset, RegisterDatasetRequest
from post_training.tracking import Tracking, TrackingServer
from tests.fakes import FakeAccess
from tests.mlflow_server import MLflowServer
from tests.test_datasets import FIELD, resolver_of

ROWS = [{"question": "2+2?", "answer": "4", "weight": 1.0}, {"question": "Wo? Über\n\u2028", "answer": "中"}]
CONTENT = (
    b'{"question": "2+2?", "answer": "4", "weight": 1.0}\n'
    b'{"question": "Wo? \xc3\x9cber\\n\xe2\x80\xa8", "answer": "\xe4\xb8\xad"}\n'
)
"""What a file of these rows holds, one JSON object a line in UTF-8, written by hand."""

CSV = "question,answer\n2+2?,4\n"


class Place:
    """An experiment of its own on the server, and the service over it."""

    def __init__(self, server: MLflowServer, experiment: str, root: Path) -> None:
        self.tracking = Tracking(TrackingServer(server.uri, experiment=experiment))
        self.records = DatasetRecords(lambda: self.tracking)
        self.resolver = resolver_of(root, registered=self.records.uri)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.service = DatasetService(
            self.records, self.resolver, lambda uri, extra: self.events.append((uri, extra))
        )

    @property
    def client(self) -> MlflowClient:
        return self.tracking.client

    def register(self, access: FakeAccess | None = None, **body: Any) -> Dataset:
        request = RegisterDatasetRequest.model_validate({"purpose": "post-training/messages", **body})
        return self.service.register(request, access or FakeAccess())

    def rows(self, *rows: dict[str, Any], dataset_id: str | None = "math", **body: Any) -> Dataset:
        return self.register(
            dataset_id=dataset_id, source={"type": "rows", "rows": list(rows or ROWS)}, **body
        )

    def uri(self, uri: str, dataset_id: str | None = "math") -> Dataset:
        return self.register(dataset_id=dataset_id, source={"type": "uri", "uri": uri})

    def runs(self) -> list[str]:
        """Every run that is not deleted, found or not."""
        experiment = self.client.get_experiment_by_name(f"{self.tracking.server.experiment}-datasets")
        if experiment is None:
            return []
        return [run.info.run_id for run in self.client.search_runs([experiment.experiment_id])]


@pytest.fixture
def place(mlflow_server: MLflowServer, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    root = tmp_path / "data"
    root.mkdir()
    (root / "train.jsonl").write_text("{}\n")
    return Place(mlflow_server, request.node.name, root)


def test_rows_are_kept_with_the_digest_that_a_trainer_records(place: Place) -> None:
    dataset = place.rows(metadata={"by": "hand", "n": [1, None]}, purpose="eval/question-answer")
    assert dataset.version == hashlib.sha256(CONTENT).hexdigest()
    assert (dataset.identifier, dataset.provider_id, dataset.type) == ("math", "mlflow", "dataset")
    assert (dataset.purpose, dataset.metadata) == ("eval/question-answer", {"by": "hand", "n": [1, None]})
    assert (dataset.source.type, dataset.source.rows) == ("rows", ROWS)
    assert place.service.get("math", FakeAccess()) == dataset
    resolved = place.resolver.dataset(FIELD, "math")
    assert resolved == dataset.source.uri == f"runs:/{dataset.provider_resource_id}/rows.jsonl"
    read = read_dataset(resolved, place.tracking.server.uri)
    assert read.digest == dataset.version
    assert [row.value for row in read.rows] == ROWS
    assert place.client.get_run(dataset.provider_resource_id).info.status == "FINISHED"


def test_each_new_version_updates_the_data_sets_asset(place: Place) -> None:
    versions = [place.rows(ROWS[0]).version, place.rows(*ROWS).version]
    place.rows(*ROWS)
    uri = "x-post-training://datasets/math"
    assert place.events == [(uri, {"dataset": f"math@{version}"}) for version in versions]


def test_a_version_whose_event_is_lost_is_registered(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    def busy(uri: str, extra: dict[str, Any]) -> None:
        raise RecordUnavailableError("Airflow's database is busy")

    place.service = DatasetService(place.records, place.resolver, busy)
    assert place.rows(*ROWS).source.rows == ROWS
    assert "No asset event of the data set math: Airflow's database is busy" in caplog.text


@pytest.mark.parametrize(
    ("uri", "name", "content"),
    [
        ("data:text/csv;base64,cXVlc3Rpb24sYW5zd2VyCjIrMj8sNAo=", "rows.csv", CSV.encode()),
        ("data:TEXT/CSV;BASE64,cXVlc3Rpb24sYW5zd2VyCjIrMj8sNAo=", "rows.csv", CSV.encode()),
        ("DATA:csv,question,answer%0A2+2%3F,4%0A", "rows.csv", CSV.encode()),
        ("data:application/json,[%7B%22a%22:1%7D]", "rows.json", b'[{"a":1}]'),
        ("data:None;base64,eyJhIjogMX0K", "rows.jsonl", b'{"a": 1}\n'),  # the client's command-line tool
    ],
)
def test_what_a_data_uri_holds_is_kept_as_a_file(place: Place, uri: str, name: str, content: bytes) -> None:
    dataset = place.uri(uri)
    assert dataset.source.type == "uri"
    assert dataset.source.uri == f"runs:/{dataset.provider_resource_id}/{name}"
    assert dataset.version == hashlib.sha256(content).hexdigest()
    stored = read_dataset(place.resolver.dataset(FIELD, "math"), place.tracking.server.uri)
    sent = read_dataset("data:" + uri.partition(":")[2])
    assert (stored.digest, list(stored.rows)) == (sent.digest, list(sent.rows))
    assert stored.digest == dataset.version


def test_a_uri_is_kept_as_it_is_and_checked_at_each_use(place: Place, tmp_path: Path) -> None:
    for uri in ("https://example.org/rows.jsonl?signature=a", f"file:{tmp_path}/data/train.jsonl"):
        dataset = place.uri(uri)
        shown = uri.partition("?")[0]  # the query may be a signature, which no viewer needs
        assert (dataset.source.type, dataset.source.uri, dataset.source.rows) == ("uri", shown, None)
        assert place.records.uri("math") == uri
        assert dataset.version == hashlib.sha256(uri.encode()).hexdigest()
        assert place.service.get("math", FakeAccess()) == dataset
        assert place.service.list(FakeAccess()).data == [dataset]
    assert place.resolver.dataset(FIELD, "math") == f"{tmp_path}/data/train.jsonl"
    (tmp_path / "data" / "train.jsonl").unlink()
    with pytest.raises(InvalidRequestError, match=f"{FIELD}: no such file"):
        place.resolver.dataset(FIELD, "math")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("train.jsonl", "must be a URI"),
        ("other-id", "must be a URI"),
        ("lsfs://rows.jsonl", "scheme must be one of"),
        ("file:/etc/passwd.jsonl", "allowed_roots"),
        ("data:csv;base64,???", "cannot be read"),
        ("data:csv", "needs a comma"),
        ("data:," + "a" * 100, "a data: URI may have 100 bytes"),
    ],
)
def test_a_uri_that_no_request_may_name_is_not_registered(place: Place, uri: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        place.uri(uri)
    assert caught.value.errors[0]["loc"] == ["source", "uri"]
    assert place.runs() == []


def test_the_same_again_makes_nothing_and_another_content_is_a_new_version(place: Place) -> None:
    first = place.rows()
    assert place.rows() == first
    assert place.runs() == [first.provider_resource_id]
    second = place.rows({"question": "3+3?", "answer": "6"})
    assert second.version != first.version
    assert place.service.get("math", FakeAccess()) == second
    assert place.rows() == place.service.get("math", FakeAccess()), "the first content again is the newest"
    assert len(place.runs()) == 3
    assert place.rows(metadata={"a": 1}).metadata == {"a": 1}
    assert place.rows(metadata={"a": 1}, purpose="eval/question-answer").purpose == "eval/question-answer"
    assert len(place.runs()) == 5


def test_another_kind_of_file_or_of_value_is_a_new_version(place: Place) -> None:
    place.uri("data:,question,answer%0A2+2%3F,4%0A")
    table = place.uri("data:text/csv ;header=present,question,answer%0A2+2%3F,4%0A")
    assert table.source.uri == f"runs:/{table.provider_resource_id}/rows.csv"
    assert place.uri("data:csv,question,answer%0A2+2%3F,4%0A") == table
    place.rows(metadata={"gold": 1})
    gold = place.rows(metadata={"gold": True})
    assert gold.metadata["gold"] is True
    assert place.rows(metadata={"gold": True}) == gold
    assert len(place.runs()) == 4
    link = place.uri("https://example.org/rows.jsonl", dataset_id="link")
    assert place.uri("https://example.org/rows.jsonl", dataset_id="link") == link
    assert len(place.runs()) == 5


def test_the_same_at_once_is_stored_once(place: Place) -> None:
    place.rows(dataset_id="other")  # the experiment is there
    with ThreadPoolExecutor(6) as pool:
        registered = list(pool.map(lambda _: place.rows(), range(6)))
    assert len(place.runs()) == 2
    assert len({dataset.provider_resource_id for dataset in registered}) == 1


def test_a_digest_names_a_version(place: Place) -> None:
    first, second = place.rows(), place.rows({"a": 1})
    for version in (first, second):
        for digits in (8, 20, 64):
            name = f"math@{version.version[:digits]}"
            assert place.resolver.dataset(FIELD, name) == version.source.uri
            assert place.service.get(name, FakeAccess()) == version
    assert place.resolver.dataset(FIELD, "math") == second.source.uri
    other = "0" * 8 if not first.version.startswith("0" * 8) else "1" * 8
    with pytest.raises(InvalidRequestError, match=f"no data set 'math@{other}' is registered"):
        place.resolver.dataset(FIELD, f"math@{other}")


def test_a_data_set_without_an_id_is_named_by_its_content(place: Place) -> None:
    first = place.rows(dataset_id=None)
    assert first.identifier == f"dataset-{hashlib.sha256(CONTENT).hexdigest()[:16]}"
    assert place.rows(dataset_id=None) == first
    assert place.resolver.dataset(FIELD, first.identifier) == first.source.uri


def test_the_list_has_each_data_set_once_newest_first_without_rows(place: Place) -> None:
    assert place.service.list(FakeAccess()).data == []
    place.rows()
    other = place.uri("https://example.org/rows.jsonl", dataset_id="other")
    newest = place.rows({"a": 1})
    listed = place.service.list(FakeAccess()).data
    assert [dataset.version for dataset in listed] == [newest.version, other.version]
    assert [dataset.source.rows for dataset in listed] == [None, None]
    assert listed[0].source.uri == newest.source.uri


def test_the_list_has_every_page(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_training.dataset_records.DatasetRecords._search.__defaults__", (2,))
    for number in range(5):
        place.rows({"a": number}, dataset_id=f"set-{number}")
    listed = [dataset.identifier for dataset in place.service.list(FakeAccess()).data]
    assert listed == [f"set-{number}" for number in (4, 3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ("digest", "purpose", "type", "metadata", "uri")),
        ("purpose", "fun"),
        ("type", "table"),
        ("metadata", "{"),
        ("metadata", "[]"),
        ("metadata", '{"a": NaN}'),
        ("metadata", '{"a": ' + "[" * 64 + "]" * 64 + "}"),
        ("metadata", '{"a": ' + "[" * 2000 + "]" * 2000 + "}"),
    ],
)
def test_what_others_write_with_our_tags_is_left_out_and_logged(
    place: Place, caplog: pytest.LogCaptureFixture, name: str, value: str | None
) -> None:
    dataset = place.rows()
    run = place.client.get_run(dataset.provider_resource_id)
    ours = {tag: text for tag, text in run.data.tags.items() if tag.startswith("post_training.")}
    ours[f"post_training.dataset_{name}"] = value
    tags = {tag: text for tag, text in ours.items() if text is not None}
    posing = place.client.create_run(run.info.experiment_id, tags=tags).info.run_id
    assert place.service.get("math", FakeAccess()) == dataset
    assert [entry.version for entry in place.service.list(FakeAccess()).data] == [dataset.version]
    assert f"The run {posing} is no version of a data set" in caplog.text
    place.service.delete("math", FakeAccess())
    assert place.runs() == [posing]


def test_a_delete_that_breaks_off_leaves_the_current_version(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.rows({"a": 1})
    current, delete_run = place.rows(), place.client.delete_run

    def fail_at_current(run_id: str) -> None:
        if run_id == current.provider_resource_id:
            raise MlflowException("down")
        delete_run(run_id)

    with monkeypatch.context() as patch:
        patch.setattr(place.client, "delete_run", fail_at_current)
        with pytest.raises(RecordUnavailableError):
            place.service.delete("math", FakeAccess())
    assert place.runs() == [current.provider_resource_id]
    assert place.service.get("math", FakeAccess()) == current
    place.service.delete("math", FakeAccess())
    assert place.runs() == []


def test_a_deleted_data_set_is_gone_and_jobs_still_read_it(place: Place) -> None:
    place.rows({"a": 1})
    dataset, kept = place.rows(), place.rows(dataset_id="math2")
    place.service.delete("math", FakeAccess())
    assert place.runs() == [kept.provider_resource_id]
    for call in (place.service.get, place.service.delete):
        with pytest.raises(DatasetNotFoundError, match="no data set 'math'"):
            call("math", FakeAccess())
    with pytest.raises(InvalidRequestError) as caught:
        place.resolver.dataset(FIELD, "math")
    assert caught.value.errors[0]["type"] == "not_found"
    assert read_dataset(dataset.source.uri, place.tracking.server.uri).digest == dataset.version
    assert place.rows().provider_resource_id != dataset.provider_resource_id


@pytest.mark.parametrize(
    "name", ["nobody", "a'b", "' OR '1'='1", "a@b", "math@abcdef12", "rows.jsonl", "a/b"]
)
def test_what_is_no_id_is_not_found(place: Place, name: str) -> None:
    place.rows()
    with pytest.raises(DatasetNotFoundError):
        place.service.delete(name, FakeAccess())
    with pytest.raises(DatasetNotFoundError):
        place.service.get(name, FakeAccess())
    assert len(place.runs()) == 1


@pytest.mark.parametrize("broken", ["log_artifact", "set_terminated", "set_tag"])
def test_a_version_is_complete_or_not_there(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """MLflow fails at each step of storing a version, and cannot even delete what is left."""

    def failing(name: str) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            raise MlflowException(f"{name} failed")

        return fail

    first = place.rows()
    with monkeypatch.context() as patch:
        patch.setattr(place.client, broken, failing(broken))
        with pytest.raises(RecordUnavailableError, match="MLflow does not answer"):
            place.rows({"a": 1})
        assert place.runs() == [first.provider_resource_id]
        patch.setattr(place.client, "delete_run", failing("delete_run"))
        with pytest.raises(RecordUnavailableError, match="MLflow does not answer"):
            place.rows({"a": 1})
    assert caplog.text.count(f"{broken} failed") == 2
    assert len(place.runs()) == 2
    assert place.service.get("math", FakeAccess()) == first
    assert [dataset.version for dataset in place.service.list(FakeAccess()).data] == [first.version]


def test_the_id_is_written_last(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    for name in ("create_run", "log_artifact", "set_terminated", "set_tag"):
        original = getattr(place.client, name)
        monkeypatch.setattr(
            place.client,
            name,
            lambda *args, _name=name, _call=original, **kw: calls.append((_name, args)) or _call(*args, **kw),
        )
    place.rows()
    assert calls[-1][0] == "set_tag"
    assert calls[-1][1][1:] == (TAG_ID, "math")
    assert TAG_ID not in str(calls[:-1])


def test_an_experiment_that_was_deleted_is_a_record_that_does_not_answer(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.rows()
    experiment = place.client.get_experiment_by_name(f"{place.tracking.server.experiment}-datasets")
    assert experiment is not None
    place.client.delete_experiment(experiment.experiment_id)
    with pytest.raises(RecordUnavailableError, match="MLflow does not answer"):
        place.rows({"a": 1})
    assert "must be in the 'active' state" in caplog.text


def test_without_mlflow_every_call_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = Place(MLflowServer(tmp_path), "down", tmp_path)
    calls = (
        place.rows,
        lambda: place.service.list(FakeAccess()),
        lambda: place.service.get("math", FakeAccess()),
        lambda: place.service.delete("math", FakeAccess()),
        lambda: place.resolver.dataset(FIELD, "math"),
    )
    for call in calls:
        with pytest.raises(RecordUnavailableError, match="MLflow does not answer"):
            call()


@pytest.mark.parametrize("dag_id", ["supervised_fine_tune", "preference_optimize"])
def test_the_right_to_one_kind_of_job_is_enough(place: Place, dag_id: str) -> None:
    class Partial(FakeAccess):
        def may_read(self, dag_id: str) -> bool:
            return dag_id == wanted

        def may_trigger(self, dag_id: str) -> bool:
            return dag_id == wanted

    wanted = dag_id
    dataset = place.rows(access=Partial())
    assert [entry.version for entry in place.service.list(Partial()).data] == [dataset.version]
    place.service.delete("math", Partial())


def test_who_may_not(place: Place) -> None:
    dataset = place.rows()
    viewer, stranger = FakeAccess("viewer", trigger=False), FakeAccess("x", read=False, trigger=False)
    for change in (lambda: place.rows(access=viewer), lambda: place.service.delete("math", viewer)):
        with pytest.raises(ForbiddenError, match="viewer may change no data sets"):
            change()
    assert place.service.get("math", viewer) == dataset
    for read in (lambda: place.service.list(stranger), lambda: place.service.get("math", stranger)):
        with pytest.raises(ForbiddenError, match="x may see no data sets"):
            read()


def test_the_metadata_is_json_in_the_run(place: Place) -> None:
    metadata = {"text": "x" * 4900}
    dataset = place.rows(metadata=metadata)
    tags = place.client.get_run(dataset.provider_resource_id).data.tags
    assert json.loads(tags["post_training.dataset_metadata"]) == metadata
