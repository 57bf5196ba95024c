"""The documentation: tables as the code has them, links that lead somewhere, commands that somebody runs."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import BaseOperator
from typer.main import get_command

from docs.reference import MODELS, OPERATORS, OTHER_OPERATORS, example_of, written
from docs.sizing import MODELS as SIZED
from lightning_modules.base_model import meta_model
from post_training import __version__
from post_training.cli.app import app
from post_training.cli.request_file import method_of, read_body
from post_training.get_provider_info import get_provider_info
from post_training.schemas.requests import REQUESTS
from post_training.schemas.retraining import RetrainingFile
from post_training.schemas.rlhf import PostTrainingRLHFRequest, read_request
from tests.documents import (
    DOCUMENTS,
    ELSEWHERE,
    LANGUAGES,
    NOT_RUN,
    ROOT,
    Block,
    anchors,
    blocks,
    inline_code,
    links,
)

ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
EXAMPLES = ROOT / "docs" / "examples"


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_language(language: str) -> list[Block]:
    return [block for block in ALL_BLOCKS if block.language == language]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_tables_are_what_the_code_says(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text == written(text), "make docs writes them"


def test_every_group_of_fields_that_a_caller_sends_has_its_table() -> None:
    names: set[str] = set()
    for model in (*REQUESTS.values(), PostTrainingRLHFRequest, RetrainingFile):
        document = model.model_json_schema()
        names |= {model.__name__, *document["$defs"]}
    tables = {
        name for document in DOCUMENTS for name in re.findall(r"table: fields:(\w+)", document.read_text())
    }
    assert names & MODELS.keys() - tables == set()
    assert {"LoggerConfig", "SearchConfig", "RegisterDatasetRequest", "EvaluationConfig"} <= tables


def test_models_that_are_sized_have_the_published_numbers_of_parameters() -> None:
    parameters = {name: meta_model(config).num_parameters() for name, config in SIZED.items()}
    assert parameters == {
        "SmolLM2 135M": 134_515_008,
        "SmolLM2 360M": 361_821_120,
        "Llama 3.2 1B": 1_235_814_400,
        "Llama 3.2 3B": 3_212_749_824,
        "Llama 3.1 8B": 8_030_261_248,
        "Llama 3.3 70B": 70_553_706_496,
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        if re.match(r"https?://", target):
            continue
        place, _, anchor = target.partition("#")
        path = (document.parent / place).resolve() if place else document
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path), target


def test_every_field_and_parameter_has_a_meaning() -> None:
    for document in DOCUMENTS:
        for name, table in re.findall(
            r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", document.read_text(), re.DOTALL
        ):
            assert "|  |" not in table, name


def test_every_document_is_in_the_index() -> None:
    index = set(links(ROOT / "docs" / "README.md"))
    missing = {path.name for path in (ROOT / "docs").glob("*.md")} - index - {"README.md"}
    assert missing == set()


def test_blocks_are_of_kinds_that_somebody_looks_at() -> None:
    assert {block.language for block in ALL_BLOCKS} == LANGUAGES
    for document in DOCUMENTS:
        fences = re.findall(r"^\s*```", document.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(document)), "fences stand at the beginning of their line"


def test_consoles_hold_commands() -> None:
    assert [block.name for block in of_language("console") if not block.commands] == []


def test_commands_that_are_run_elsewhere_are_in_the_docs_and_are_run_there() -> None:
    commands = {command for block in of_language("console") for command in block.commands}
    assert ELSEWHERE.keys() <= commands
    assert NOT_RUN.keys() <= commands - ELSEWHERE.keys()
    for proofs in ELSEWHERE.values():
        for proof in proofs:
            file, _, what = proof.partition("::")
            text = (ROOT / file).read_text()
            if file.endswith(".py"):
                assert what in functions(text), proof
            else:
                assert any(line.lstrip().startswith(what) for line in text.splitlines()), proof


@pytest.mark.parametrize("command", NOT_RUN)
def test_only_commands_of_containers_are_run_by_nothing(command: str) -> None:
    assert re.search(r"(^|&& |^\w+=\S+ )(docker|kubectl|helm) ", command)


def functions(source: str) -> set[str]:
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_in_the_text_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    subcommands = set(get_command(app).commands) | {"COMMAND"}  # type: ignore[attr-defined]
    for code in inline_code(document):
        if made := re.match(r"make ([a-z-]+)", code):
            assert made[1] in targets, code
        if called := re.match(r"post-training ([^-\s]\S*)", code):
            assert called[1] in subcommands, code


@pytest.mark.parametrize("block", of_language("yaml"), ids=lambda block: block.name)
def test_yaml_is_a_valid_file(block: Block, tmp_path: Path) -> None:
    file = tmp_path / block.file
    file.write_text(block.text)
    body = read_body(file, job_uuid=None, default_job_uuid="x")
    if block.file.startswith("retraining"):
        RetrainingFile.model_validate(
            {key: value for key, value in body.items() if key in RetrainingFile.model_fields}
        )
    else:
        read_request(method_of(body), body)


def test_the_readmes_key_figures_are_the_measured_ones() -> None:
    figures = (ROOT / "README.md").read_text().partition("## Key figures")[2].partition("## ")[0]
    numbers = {number for number in re.findall(r"(?<![\w-])[\d.,]*\d(?![\w-])", figures)}
    assert len(numbers) > 10
    assert numbers <= set(re.findall(r"[\d.,]*\d", (ROOT / "docs" / "performance.md").read_text()))


def test_the_tree_in_the_readme_is_there() -> None:
    (tree,) = [block for block in blocks(ROOT / "README.md") if block.language == "text"]
    assert list(missing_in(tree.text)) == []


def missing_in(tree: str) -> Iterator[str]:
    """Yield the names in an annotated tree that lead to no file."""
    parents = [ROOT]
    for line in tree.splitlines():
        found = re.match(r"( *)(\S.*?)(  |$)", line)
        assert found is not None
        depth = len(found[1]) // 4
        if depth >= len(parents) + 1 or len(found[1]) % 4 or len(found[1]) > 8:
            continue  # a description that goes on
        for name in found[2].split(", "):
            path = parents[depth] / name
            if not path.exists():
                yield name
            if name.endswith("/"):
                parents[depth + 1 :] = [path]


def test_every_operator_is_listed() -> None:
    info = get_provider_info()
    modules = [
        name for kind in ("operators", "sensors") for entry in info[kind] for name in entry["python-modules"]
    ]
    classes = {
        found.__name__
        for module in map(import_module, modules)
        for found in vars(module).values()
        if inspect.isclass(found)
        and issubclass(found, BaseOperator)
        and found.__module__ == module.__name__
        and not inspect.isabstract(found)
        and not found.__name__.startswith("_")
    }
    listed = {operator.__name__ for operator in (*OPERATORS, *OTHER_OPERATORS)}
    assert classes - {"TrainingOperator", "RegistryOperator"} <= listed


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    bag = DagBag(EXAMPLES)
    assert bag.import_errors == {}
    return dict(bag.dags)


def test_each_operator_has_an_example_and_each_example_a_test_that_runs_it(examples: dict[str, Any]) -> None:
    wanted = {example_of(operator): operator for operator in OPERATORS}
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == wanted.keys()
    run = functions((ROOT / "tests" / "system" / "test_examples.py").read_text())
    for file, operator in wanted.items():
        dag = examples[f"example_{Path(file).stem}"]
        kinds = {task.task_type for task in dag.tasks}
        assert operator.__name__ in kinds or (file == "search_before.py" and "PlanSearchOperator" in kinds)
        assert f"test_{Path(file).stem}" in run
        assert dag.doc_md


def test_the_changelog_knows_the_version() -> None:
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
