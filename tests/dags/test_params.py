"""The trigger form of every DAG: each field says what it means, in a section, with a type."""

from __future__ import annotations

from pathlib import Path

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

DAGS = Path(__file__).resolve().parents[2] / "dags"
WIDGETS = {"string", "integer", "number", "boolean", "array", "object", "null"}


@pytest.fixture(scope="module")
def dags() -> dict[str, DAG]:
    bag = DagBag(DAGS)
    assert bag.import_errors == {}
    return dict(bag.dags)


def test_every_field_is_described_typed_and_in_a_section(dags: dict[str, DAG]) -> None:
    faults, seen = [], 0
    for dag_id, dag in dags.items():
        for path in dag.params:
            param = dag.params.get_param(path)
            types = param.schema.get("type")
            kinds = set(types if isinstance(types, list) else [types])
            seen += 1
            if not (param.description or "").endswith((".", "_ -")) or len(param.description or "") < 20:
                faults.append(f"{dag_id} {path}: {param.description!r} is no description")
            if not param.schema.get("section"):
                faults.append(f"{dag_id} {path}: no section")
            if not kinds <= WIDGETS or len(kinds - {"null"}) != 1:
                faults.append(f"{dag_id} {path}: the form has no widget for {types}")
    assert faults == []
    assert seen > 200, "four DAGs of requests, the retraining and the rollback have params"


def test_fields_of_one_section_stand_together(dags: dict[str, DAG]) -> None:
    for dag_id, dag in dags.items():
        sections = [dag.params.get_param(path).schema["section"] for path in dag.params]
        changes = [one for one, before in zip(sections, [None, *sections], strict=False) if one != before]
        assert len(changes) == len(set(changes)), dag_id


def test_the_retraining_asks_for_its_data_first(dags: dict[str, DAG]) -> None:
    of_data = [path for path in dags["scheduled_retraining"].params if path.startswith("data.")]
    assert of_data[0] == "data.dataset_id"
