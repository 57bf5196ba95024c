"""Which names of data sets, models and folders are taken, and what the others are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from post_training.datasets import Resolver
from post_training.errors import InvalidRequestError
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from post_training.schemas.rlhf import read_request
from post_training.settings import Settings
from tests.requests_of import dpo_body, rlhf_body, sft_body

FIELD = "training_config.data_config.dataset_id"
RUN_ID, MODEL_ID = "0a" * 16, "m-" + "1b" * 16


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
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "model.gguf").write_text("")
    (folder / "rows.ndjson").write_text("")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def resolver(root: Path) -> Resolver:
    return resolver_of(root)


def resolver_of(
    root: Path,
    addresses: tuple[str, ...] = ("8.8.8.8",),
    registered: Callable[[str, str | None], str | None] | None = None,
    **changes: Any,
) -> Resolver:
    settings = Settings(
        **{
            "home": root / "home",
            "allowed_roots": (root,),
            "default_model": None,
            "trainer_python": "python",
            "mlflow_conn_id": "mlflow_default",
            "post_training_conn_id": "post_training_default",
            "pool": "default_pool",
            "queue": None,
            "pod_template_file": None,
            "ray_address": None,
            "ray_token": None,
            "ray_patience": 300,
            "keep_state_in_mlflow": True,
            "max_body_bytes": 1000,
            "max_data_uri_bytes": 100,
            "max_data_bytes": 1_000,
            "max_cache_bytes": 1_000,
            "retraining_config": None,
            "search_storage": "sqlite://",
            **changes,
        }
    )

    def lookup(host: str) -> tuple[str, ...]:
        host.encode("idna")
        return addresses

    return Resolver(settings, lookup=lookup, registered=registered)


def test_paths_below_a_root_become_absolute(resolver: Resolver, root: Path) -> None:
    expected = str(root / "train.jsonl")
    assert resolver.dataset(FIELD, "train.jsonl") == expected
    assert resolver.dataset(FIELD, expected) == expected
    assert resolver.dataset(FIELD, f"file://{expected}") == expected
    assert resolver.dataset(FIELD, f"FILE:{root}/with%20space.csv") == str(root / "with space.csv")
    assert resolver.dataset(FIELD, "file:rows.ndjson") == str(root / "rows.ndjson")


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/rows.jsonl",
        "https://example.org/rows.jsonl?signature=a%2Fb",
        "huggingface://datasets/org/name?split=train",
        "huggingface://datasets/org/name?split=train[:10%25]&name=main",
        "data:application/jsonl,%7B%7D",
        "data:,../::?#",
        "s3://my-bucket/folder/rows.jsonl",
        "gs://bucket.example/rows.parquet",
        "gcs://bucket/rows.csv",
        "abfs://container/rows.json",
        "abfss://container@account.dfs.core.windows.net/rows.json",
        "az://container@account.blob.core.windows.net/rows.json",
        "oci://bucket@namespace/rows.json",
        "oss://bucket/rows.json",
        f"runs:/{RUN_ID}/data/rows.jsonl",
        "mlflow-artifacts:/0/data/rows of today.jsonl",
        f"models:/{MODEL_ID}/rows.jsonl",
        "models:/my model/3/rows.jsonl",
        "models:/my.model@champion/data/rows.jsonl",
    ],
)
def test_uris_stay_as_they_are(resolver: Resolver, uri: str) -> None:
    assert resolver.dataset(FIELD, uri) == uri


def test_a_scheme_in_capitals_is_the_same_scheme(resolver: Resolver) -> None:
    assert resolver.dataset(FIELD, "S3://Bucket/Rows.jsonl") == "s3://Bucket/Rows.jsonl"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("missing.jsonl", "no such file: 'missing.jsonl'"),
        ("../secret.jsonl", "must not hold '..'"),
        ("/etc/passwd", "must lie under a folder of"),
        ("link.jsonl", "must lie under a folder of"),
        ("notes.txt", "must end in .jsonl, .ndjson, .json, .csv, .parquet, got 'notes.txt'"),
        ("empty", "no such file"),
        ("file://elsewhere/rows.jsonl", "must name this host, got 'elsewhere'"),
        ("ftp://example.org/rows.jsonl", "scheme must be one of"),
        ("http://example.org/rows.jsonl", "scheme must be one of"),
        ("ssh://host/rows.jsonl", "scheme must be one of"),
        ("local:///etc/rows.jsonl", "scheme must be one of"),
        ("memory://rows.jsonl", "scheme must be one of"),
        ("simplecache::s3://bucket/rows.jsonl", "scheme must be one of"),
        ("s3://bucket/rows.jsonl::file:///etc/rows.jsonl", "must not hold '::', which chains URIs"),
        ("https://example.org/rows.jsonl::file:///etc/rows.jsonl", "must not hold '::'"),
        ("s3://bucket/../other/rows.jsonl", "must not hold '..'"),
        ("s3://bucket/a%2f%2E./rows.jsonl", "must not hold '..'"),
        ("s3://bucket/%25252e%25252e/rows.jsonl", "must not hold '..'"),
        ("s3://bucket/rows.txt", "must end in .jsonl, .ndjson, .json, .csv, .parquet, got 'rows.txt'"),
        ("s3://bucket/.jsonl", "must end in"),
        ("s3://bucket/", "must have the form s3://BUCKET/KEY, got 's3://bucket/'"),
        ("s3:///rows.jsonl", "must have the form s3://BUCKET/KEY"),
        ("s3:bucket/rows.jsonl", "must have the form s3://BUCKET/KEY"),
        ("s3://host:9000/rows.jsonl", "must have the form s3://BUCKET/KEY"),
        ("s3://bucket/rows.jsonl?versionId=1", "must not hold a query or fragment"),
        ("s3://bucket/rows.jsonl#1", "must not hold a query or fragment"),
        ("s3://bucket/\trows.jsonl", "must not hold characters that cannot be seen"),
        ("s3://bucket/" + "x" * 4096 + ".jsonl", "a URI may have 4096 characters, got 4114"),
        ("oci://bucket@namespace@evil/rows.json", "must not hold a user or password"),
        ("abfss://container@evil.example/rows.json", "must not hold a user or password"),
        ("abfss://container@a.dfs.core.windows.net.evil.example/rows.json", "must not hold a user"),
        ("file:train.jsonl?x", "must not hold a query or fragment"),
        ("https://example.org/rows.zip?x=.jsonl", "must end in"),
        ("runs:/", "must have the form runs:/RUN_ID/PATH"),
        (f"runs:/{RUN_ID}", "must have the form runs:/RUN_ID/PATH"),
        (f"runs://host/{RUN_ID}/rows.jsonl", "must have the form runs:/RUN_ID/PATH"),
        (f"runs:/{RUN_ID}//rows.jsonl", "must have the form runs:/RUN_ID/PATH"),
        (f"runs:/{RUN_ID}/data", "must end in .jsonl"),
        (f"runs:/{RUN_ID}/%2e%2e/rows.jsonl", "must not hold '..'"),
        (f"runs:/{RUN_ID}/rows.jsonl?x", "must not hold a query"),
        ("mlflow-artifacts://evil.example/rows.jsonl", "must have the form mlflow-artifacts:/PATH"),
        ("mlflow-artifacts:rows.jsonl", "must have the form mlflow-artifacts:/PATH"),
        ("mlflow-artifacts:/a/../b/rows.jsonl", "must not hold '..'"),
        (f"models:/{MODEL_ID}", "must end in .jsonl"),
        ("models:/name/rows.jsonl", "must have the form models:/MODEL_ID, models:/NAME/VERSION or models"),
        ("models://host/name/1/rows.jsonl", "must have the form models:/MODEL_ID"),
        ("huggingface://datasets/../secret", "must not hold '..'"),
        ("huggingface://datasets/org/name/../../x", "must not hold '..'"),
        ("huggingface://models/org/name", "must have the form"),
        (
            "huggingface://datasets/org/name?revision=main",
            "may give split and name once each, got 'revision'",
        ),
        ("huggingface://datasets/org/name?split=", "may give split and name once each, got 'split'"),
        ("huggingface://datasets/org/name?split", "cannot be read: bad query field"),
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
    "uri",
    [
        "s3://key:secret@bucket/rows.jsonl",
        "https://me:secret@example.org/rows.jsonl",
        "https://me:secret@[::1/rows.jsonl",
        "s3://bucket/rows.jsonl?key=secret",
        "huggingface://datasets/a/b/c?token=secret",
        " https://example.org/rows.jsonl?X-Sig=secret",
        " https://example.org/" + "x" * 5000 + "/rows.jsonl?X-Sig=secret",
        "https://me:pass/secret@example.org/rows.jsonl",
        "https://me\uff20secret@example.org/rows.jsonl",
    ],
)
def test_secrets_are_not_repeated(resolver: Resolver, uri: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolver.dataset(FIELD, uri)
    assert "secret" not in str(caught.value)
    assert re.search("(got|no such file:) '", str(caught.value))


def test_a_circle_of_links_is_an_error_of_its_field(resolver: Resolver, root: Path) -> None:
    (root / "circle.jsonl").symlink_to("circle.jsonl")
    with pytest.raises(InvalidRequestError, match=f"^{FIELD}: (cannot be read|no such file)"):
        resolver.dataset(FIELD, "circle.jsonl")
    with pytest.raises(InvalidRequestError, match=r"^model: (cannot be read|no such file)"):
        resolver.model(request(model="./circle.jsonl"))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_not(root: Path, address: str) -> None:
    uri = "https://example.org/rows.jsonl"
    assert resolver_of(root, (address,)).dataset(FIELD, uri) == uri


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("https://example.org:99999/rows.jsonl", "cannot be read: Port out of range"),
        ("https://example.org:a/rows.jsonl", "cannot be read: Port could not be cast"),
        ("https://example.org/my rows.jsonl", "must be percent-encoded"),
        ("https://example.org/r\u00f6ws.jsonl", "must be percent-encoded"),
    ],
)
def test_addresses_that_no_client_could_open_are_refused(resolver: Resolver, uri: str, rule: str) -> None:
    with pytest.raises(InvalidRequestError, match=rule):
        resolver.dataset(FIELD, uri)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "169.254.169.254",
            "192.168.1.1",
            "224.0.0.1",
            "::1",
            "fd00::1",
            "fec0::1",
        ),
        "64:ff9b::a9fe:a9fe",  # NAT64 and 6to4 forms of 169.254.169.254
        "2002:a9fe:a9fe::1",
    ],
)
def test_private_addresses_are_refused(root: Path, address: str) -> None:
    resolver = resolver_of(root, ("8.8.8.8", address))
    with pytest.raises(InvalidRequestError, match="must not name a private address, got host 'intern'"):
        resolver.dataset(FIELD, "https://intern/rows.jsonl")


@pytest.mark.parametrize("name", ["org/model", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_models_are_taken(resolver: Resolver, name: str) -> None:
    assert resolver.model(request(model=name)) == name


@pytest.mark.parametrize("name", ["model", "adapter", "model.gguf"])
def test_models_below_a_root_become_absolute(resolver: Resolver, root: Path, name: str) -> None:
    expected = str(root / name)
    assert resolver.model(request(model=expected)) == expected
    assert resolver.model(request(model=f"./{name}")) == expected
    assert resolver.model(request(model=f"file://{expected}")) == expected


@pytest.mark.parametrize(
    "uri",
    [
        f"models:/{MODEL_ID}",
        "models:/my model/12",
        "models:/my.model@champion",
        "models:/name/1/inside",
        f"runs:/{RUN_ID}/model",
        "mlflow-artifacts:/0/model.gguf",
    ],
)
def test_models_in_mlflow_are_taken(resolver: Resolver, uri: str) -> None:
    assert resolver.model(request(model=uri)) == uri
    preference = PreferenceOptimizeRequest.model_validate(dpo_body(finetuned_model=uri))
    assert resolver.model(preference) == uri


def test_a_hub_uri_is_its_hub_id(resolver: Resolver) -> None:
    assert resolver.model(request(model="huggingface://Org/Model-1.5")) == "Org/Model-1.5"
    assert resolver.model(request(model="huggingface://gpt2")) == "gpt2"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("/etc", "must lie under a folder of"),
        ("./nothing", "no such file or folder: './nothing'"),
        ("other.gguf", "no such file or folder"),
        ("./train.jsonl", "must end in .gguf, got 'train.jsonl'"),
        ("file:///etc", "must lie under a folder of"),
        (
            "https://example.org/model",
            "scheme must be one of file, huggingface, mlflow-artifacts, models, runs",
        ),
        ("s3://bucket/model", "scheme must be one of file, huggingface, mlflow-artifacts, models, runs"),
        ("huggingface://datasets/name", "must have the form huggingface://ORG/NAME"),
        ("huggingface://org/name/file", "must have the form huggingface://ORG/NAME"),
        ("huggingface://org/name?revision=x", "must not hold a query"),
        ("models:/name", "must have the form models:/MODEL_ID, models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("models:/name/Production", "must have the form models:/MODEL_ID"),
        ("models:/name/0", "must have the form models:/MODEL_ID"),
        ("models:/../1", "must not hold '..'"),
        ("mlflow-artifacts://evil.example/model", "must have the form mlflow-artifacts:/PATH"),
        (f"runs:/{RUN_ID}", "must have the form runs:/RUN_ID/PATH"),
        (f"runs:/{RUN_ID}/model/", "must have the form runs:/RUN_ID/PATH"),
        ("models:/name/1x", "must have the form models:/MODEL_ID"),
        ("a/b/c", "hub id like org/name"),
        ("org/mo del", "hub id like org/name"),
    ],
)
def test_other_models_are_refused(resolver: Resolver, name: str, rule: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolver.model(request(model=name))
    assert caught.value.errors[0]["loc"] == ["model"]
    assert rule in caught.value.errors[0]["msg"]


def test_a_model_folder_needs_a_config(resolver: Resolver, root: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no config\.json and no adapter_config\.json"):
        resolver.model(request(model=str(root / "empty")))


def test_the_default_model_is_for_requests_without_one(root: Path) -> None:
    assert resolver_of(root, default_model="/models/base").model(request(model=None)) == "/models/base"
    with pytest.raises(InvalidRequestError, match="is required"):
        resolver_of(root).model(request(model=None))


def test_the_default_model_may_lie_outside_the_roots(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "base"
    resolver = resolver_of(root, default_model=str(outside))
    assert resolver.model(request(model=str(outside))) == str(outside)
    assert resolver.model_roots() == (root, outside)
    with pytest.raises(InvalidRequestError, match="must lie under a folder of"):
        resolver.model(request(model=f"{outside}/inside"))


@pytest.mark.parametrize("default", [None, "org/name", f"models:/{MODEL_ID}"])
def test_a_default_model_that_is_no_path_is_no_root(root: Path, default: str | None) -> None:
    assert resolver_of(root, default_model=default).model_roots() == (root,)


def test_a_default_model_with_a_scheme_is_checked(root: Path) -> None:
    assert resolver_of(root, default_model="huggingface://org/name").model(request(model=None)) == "org/name"


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
    (root / "links").mkdir()
    (root / "links" / "job-1").symlink_to(root.parent)
    with pytest.raises(InvalidRequestError, match="checkpoint_dir: must lie under"):
        resolver.checkpoint_dir(request(checkpoint_dir=str(root / "links")))


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


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dataset_id", {"dataset_id": "no.jsonl"}),
        ("validation_dataset_id", {"validation_dataset_id": "no.jsonl"}),
        ("finetuned_model.uri", {"finetuned_model__uri": "./no"}),
    ],
)
def test_the_long_form_is_refused_by_its_own_fields(
    resolver: Resolver, field: str, change: dict[str, Any]
) -> None:
    good = {"finetuned_model__uri": "org/name", "dataset_id": "train.jsonl"}
    good |= {"validation_dataset_id": "train.jsonl"}
    resolver.check(read_request("preference_optimize", rlhf_body(**good)))
    with pytest.raises(InvalidRequestError, match=f"^{field}: no such file"):
        resolver.check(read_request("preference_optimize", rlhf_body(**(good | change))))


def request(**changes: Any) -> SupervisedFineTuneRequest:
    return SupervisedFineTuneRequest.model_validate(sft_body(**changes))


REGISTERED = {
    ("math", None): f"runs:/{RUN_ID}/rows.jsonl",
    ("math", "0123abcd"): "S3://bucket/old.jsonl",
    ("private", None): "https://10.0.0.1/rows.jsonl",
    ("broken", None): "rows.jsonl",
}


def registered(dataset_id: str, digest: str | None) -> str | None:
    return REGISTERED.get((dataset_id, digest))


def test_a_name_that_is_no_path_and_no_uri_is_a_registered_id(root: Path) -> None:
    resolver = resolver_of(root, registered=registered)
    assert resolver.dataset(FIELD, "math") == f"runs:/{RUN_ID}/rows.jsonl"
    assert resolver.dataset(FIELD, "math@0123abcd") == "s3://bucket/old.jsonl"
    assert resolver.dataset(FIELD, "train.jsonl") == str(root / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "no data set 'unknown' is registered, and a path ends in .jsonl"),
        ("math@ffffffff", "no data set 'math@ffffffff' is registered"),
        ("math@0123", "no such file"),
        ("notes.txt", "no data set 'notes.txt' is registered"),
        ("empty/notes", "no such file"),
        ("private", "must not name a private address"),
        ("broken", "must be a URI"),
    ],
)
def test_registered_ids_that_are_refused(root: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        resolver_of(root, ("10.0.0.1",), registered=registered).dataset(FIELD, name)
    assert ".".join(map(str, caught.value.errors[0]["loc"])) == FIELD


def test_without_a_registry_no_name_is_an_id(resolver: Resolver) -> None:
    with pytest.raises(InvalidRequestError, match="no such file: 'math'"):
        resolver.dataset(FIELD, "math")
