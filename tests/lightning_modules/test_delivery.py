"""How a data set's source is described in MLflow: recognizable, and without secrets."""

from __future__ import annotations

import json

import mlflow
import pytest
from mlflow.entities import Dataset

from lightning_modules.delivery import describe_source


@pytest.mark.parametrize(
    ("source", "described"),
    [
        ("/data/x#1.jsonl", ("local", {"uri": "/data/x#1.jsonl"})),
        ("file:///data/x.jsonl", ("local", {"uri": "/data/x.jsonl"})),
        ("https://me:secret@host/x.jsonl?sig=secret", ("http", {"url": "https://host/x.jsonl"})),
        ("s3://bucket/x.jsonl", ("s3", {"uri": "s3://bucket/x.jsonl"})),
        (
            "abfs://rows@account.dfs.core.windows.net/x.jsonl",
            ("abfs", {"uri": "abfs://rows@account.dfs.core.windows.net/x.jsonl"}),
        ),
        (
            "huggingface://datasets/org/name?split=train&name=main&token=secret",
            ("hugging_face", {"path": "org/name", "split": "train", "config_name": "main"}),
        ),
        ("runs:/0123/data/x.jsonl", ("runs", {"uri": "runs:/0123/data/x.jsonl"})),
        ("models:/m-0123/x.jsonl", ("models", {"uri": "models:/m-0123/x.jsonl"})),
        ("models:/name@champion/x.jsonl", ("models", {"uri": "models:/name@champion/x.jsonl"})),
        ("mlflow-artifacts:/0/x.jsonl", ("mlflow-artifacts", {"uri": "mlflow-artifacts:/0/x.jsonl"})),
        (
            "mlflow-artifacts://me:secret@host:5000/0/x.jsonl",
            ("mlflow-artifacts", {"uri": "mlflow-artifacts://host:5000/0/x.jsonl"}),
        ),
        ("data:text/csv;base64,QUJD", ("data", {"uri": "data:text/csv;base64,..."})),
    ],
)
def test_a_source_is_described_without_secrets(source: str, described: tuple[str, dict[str, str]]) -> None:
    assert describe_source(source) == described


@pytest.mark.parametrize(
    "source", ["/data/x.jsonl", "https://host/x.jsonl", "s3://bucket/x", "huggingface://datasets/org/name"]
)
def test_mlflow_knows_the_described_source(source: str) -> None:
    source_type, fields = describe_source(source)
    known = mlflow.data.get_source(Dataset("name", "digest", source_type, json.dumps(fields)))
    assert known.to_dict().items() >= fields.items()
