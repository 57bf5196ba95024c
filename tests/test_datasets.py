"""Which names of data sets, models and folders are taken, and what the others are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from post_training.datasets import Resolver
from post_training.errors import InvalidRequestError
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.settings import Settings
from tests.requests_of import sft_body

FIELD = "training_config.data_config.dataset_id"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("")
    (folder / "with space.csv").write_text("")
    (tmp_path / "secret.jsonl").write_text("{}\n")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def resolver(root: Path) -> Resolver:
    return resolver_of(root)


def resolver_of(root: Path, addresses: tuple[str, ...] = ("8.8.8.8",), **changes: Any) -> Resolver:
    settings = Settings(
        **{
            "home": root / "home",
            "allowed_roots": (root,),
            "default_model": None,
            "trainer_python": "python",
            "mlflow_conn_id": "mlflow_default",
            "post_training_conn_id": "post_training_default",
            "pool": "default_pool",
            "max_body_bytes": 1000,
            "max_data_uri_bytes": 100,
            **changes,
        }
    )

    def lookup(host: str) -> tuple[str, ...]:
        host.encode("idna")
        return addresses

    return Resolver(settings, lookup=lookup)


def test_paths_below_a_root_become_absolute(resolver: Resolver, root: Path) -> None:
    expected = str(root / "train.jsonl")
    assert resolver.dataset(FIELD, "train.jsonl") == expected
    assert resolver.dataset(FIELD, expected) == expected
    assert resolver.dataset(FIELD, f"file://{expected}") == expected
    assert resolver.dataset(FIELD, f"file:{root}/with%20space.csv") == str(root / "with space.csv")


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/rows.jsonl",
        "huggingface://datasets/org/name?split=train",
        "data:application/jsonl,%7B%7D",
    ],
)
def test_uris_stay_as_they_are(resolver: Resolver, uri: str) -> None:
    assert resolver.dataset(FIELD, uri) == uri


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("missing.jsonl", "no such file: 'missing.jsonl'"),
        ("../secret.jsonl", "must not hold '..'"),
        ("/etc/passwd", "must lie under a folder of"),
        ("link.jsonl", "must lie under a folder of"),
        ("notes.txt", "must end in .jsonl, .json, .csv, .parquet, got 'notes.txt'"),
        ("empty", "no such file"),
        ("file://elsewhere/rows.jsonl", "must name this host, got 'elsewhere'"),
        ("ftp://example.org/rows.jsonl", "scheme must be one of"),
        ("http://example.org/rows.jsonl", "scheme must be one of"),
        ("s3://bucket/rows.jsonl", "scheme must be one of"),
        ("huggingface://datasets/../secret", "must have the form"),
        ("huggingface://datasets/org/name/../../x", "must have the form"),
        ("huggingface://models/org/name", "must have the form"),
        ("https://[::1", "cannot be read"),
        ("https://" + "a" * 64 + ".org/rows.jsonl", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("data:text/plain", "needs a comma"),
        ("https://me:secret@example.org/rows.jsonl", "must not hold a user or password"),
        ("https:///rows.jsonl", "must name a host"),
        ("data:text/plain," + "x" * 100, "may have 100 bytes, got 116"),
    ],
)
def test_other_data_are_refused(resolver: Resolver, name: str, rule: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolver.dataset(FIELD, name)
    (error,) = caught.value.errors
    assert ".".join(map(str, error["loc"])) == FIELD
    assert rule in error["msg"]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "::1", "fd00::1"]
)
def test_private_addresses_are_refused(root: Path, address: str) -> None:
    resolver = resolver_of(root, ("8.8.8.8", address))
    with pytest.raises(InvalidRequestError, match="must not name a private address, got host 'intern'"):
        resolver.dataset(FIELD, "https://intern/rows.jsonl")


@pytest.mark.parametrize("name", ["org/model", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_models_are_taken(resolver: Resolver, name: str) -> None:
    assert resolver.model(request(model=name)) == name


def test_model_folders_are_taken(resolver: Resolver, root: Path) -> None:
    assert resolver.model(request(model=str(root / "model"))) == str(root / "model")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("/etc", "must lie under a folder of"),
        ("./nothing", "no such file"),
        ("model.gguf", "no such file"),
        ("https://example.org/model", "must be a path or a hub id"),
        ("a/b/c", "hub id like org/name"),
        ("org/mo del", "hub id like org/name"),
    ],
)
def test_other_models_are_refused(resolver: Resolver, name: str, rule: str) -> None:
    with pytest.raises(InvalidRequestError, match=rule) as caught:
        resolver.model(request(model=name))
    assert caught.value.errors[0]["loc"] == ["model"]


def test_a_model_folder_needs_a_config(resolver: Resolver, root: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no config\.json"):
        resolver.model(request(model=str(root / "empty")))


def test_the_default_model_is_for_requests_without_one(root: Path) -> None:
    assert resolver_of(root, default_model="/models/base").model(request(model=None)) == "/models/base"
    with pytest.raises(InvalidRequestError, match="is required"):
        resolver_of(root).model(request(model=None))


def test_checkpoints_go_into_the_jobs_own_folder(resolver: Resolver, root: Path) -> None:
    assert resolver.checkpoint_dir(request(checkpoint_dir=str(root / "out"))) == root / "out" / "job-1"
    assert resolver.checkpoint_dir(request(checkpoint_dir=None)) is None
    with pytest.raises(
        InvalidRequestError, match=r"checkpoint_dir: must be a folder, 'train\.jsonl' is none"
    ):
        resolver.checkpoint_dir(request(checkpoint_dir=str(root / "train.jsonl")))
    with pytest.raises(InvalidRequestError, match="checkpoint_dir: cannot be read"):
        resolver.checkpoint_dir(request(checkpoint_dir="x" * 5000))
    with pytest.raises(InvalidRequestError, match="checkpoint_dir: must lie under"):
        resolver.checkpoint_dir(request(checkpoint_dir="/tmp/out"))


def test_check_looks_at_everything(resolver: Resolver) -> None:
    resolver.check(request())
    for changes in (
        {"training_config__data_config__dataset_id": "no.jsonl"},
        {"training_config__data_config__validation_dataset_id": "no.jsonl"},
        {"model": "/no/model"},
        {"checkpoint_dir": "/no/folder"},
    ):
        with pytest.raises(InvalidRequestError):
            resolver.check(request(**changes))


def request(**changes: Any) -> SupervisedFineTuneRequest:
    return SupervisedFineTuneRequest.model_validate(sft_body(**changes))
