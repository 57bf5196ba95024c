"""Runs what the documentation shows: every command of a console and every block of Python, in their order.

What other tests run is in ``tests.documents.ELSEWHERE``, what nothing can run here in ``NOT_RUN``. The
servers are those of all system tests; models and data have the names that the documents use.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from post_training.standalone import Standalone
from post_training.standalone_layout import server_environment
from tests.documents import DOCUMENTS, ELSEWHERE, NOT_RUN, ROOT, Block, blocks
from tests.lightning_modules.bases import load, write_gguf
from tests.system.conftest import Deployment
from tests.waiting import answers, wait_until

pytestmark = pytest.mark.system

README = ROOT / "README.md"
QUICK_START, OPERATIONS = (ROOT / "docs" / f"{name}.md" for name in ("quick-start", "operations"))
RUN = [
    document
    for document in DOCUMENTS
    if {block.language for block in blocks(document)} & {"console", "python"}
]

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The README's model. Here it is the tiny one: `make demo`, which CI runs, trains the real file."""


def pack(model: Path, file: Path) -> None:
    """Write a model and its tokenizer as a gguf file."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    write_gguf(load(model), file, tokens, [" ".join(pair) for pair in tokenizer["merges"]])


class Reader:
    """Does what a document shows, in a folder and with the servers that it speaks of."""

    def __init__(self, deployment: Deployment, state: Path) -> None:
        self._deployment = deployment
        self._state = state
        self._folder = deployment.data
        servers = deployment.servers
        passwords = {"admin": servers.password()}
        self._environment = {
            **server_environment(servers.layout, passwords, os.environ, {}),
            "POST_TRAINING_HOME": str(servers.layout.home),
            "PASSWORD": servers.password(),
        }
        self._meant = {
            "http://127.0.0.1:8080": servers.airflow_url,
            '"password": "…"': f'"password": "{servers.password()}"',
            "SERVERS=.post-training": f"SERVERS={servers.layout.home}",
        }

    def follow(self, document: Path) -> str:
        """Do all that a document shows; see that the jobs which it names complete.

        :returns: what its Python has printed before that was seen.
        """
        self._state.unlink(missing_ok=True)
        python: dict[str, Any] = {}
        printed = StringIO()
        for block in blocks(document):
            if block.language == "yaml":
                (self._folder / block.file).write_text(block.text)
            elif block.language == "console":
                self._type(block)
            elif block.language == "python":
                with redirect_stdout(printed):
                    exec(compile(self._text(block), block.name, "exec"), python)
        for block in blocks(document):
            for job_uuid in re.findall(r'job_uuid="([\w-]+)"', block.text):
                assert self._deployment.wait(job_uuid).status == "completed"
        return printed.getvalue()

    def _text(self, block: Block) -> str:
        text = block.text
        for written, meant in self._meant.items():
            text = text.replace(written, meant)
        return text

    def _type(self, block: Block) -> None:
        """Type the commands of a console into a shell that remembers the variables of those before."""
        commands = [command for command in block.commands if command not in ELSEWHERE.keys() | NOT_RUN]
        script = "\n".join(
            [
                "set -eaEuo pipefail",
                f'[ ! -e "{self._state}" ] || . "{self._state}"',
                "trap 'echo \"it failed: $BASH_COMMAND\" >&2' ERR",
                *(self._text(Block(block.document, block.line, "console", command)) for command in commands),
                f'export -p > "{self._state}"',
            ]
        )
        done = subprocess.run(
            ["bash", "-c", script], cwd=self._folder, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.name}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def reader(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Who has followed the quick start: the other documents go on from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(deployment.data)
        patch.setenv("MLFLOW_TRACKING_URI", deployment.servers.mlflow_url)
        (deployment.data / "models").mkdir()
        shutil.copytree(deployment.model, deployment.data / "models" / "SmolLM2-135M-Instruct")
        pack(deployment.model, deployment.data / GGUF_NAME)
        (deployment.data / "data").mkdir()
        for file in ("train.jsonl", "pairs.jsonl"):
            shutil.copy(deployment.data / file, deployment.data / "data" / file)
        reader = Reader(deployment, tmp_path_factory.mktemp("shell") / "variables")
        reader.follow(QUICK_START)
        yield reader


def test_the_quick_start(deployment: Deployment, reader: Reader) -> None:
    assert deployment.client().post_training.job.status(job_uuid="my-lora").status == "completed"
    assert (deployment.data / "post_training_runs" / "my-lora").is_dir()


def test_the_readmes_session_ends_with_its_checkpoints(deployment: Deployment, reader: Reader) -> None:
    printed = reader.follow(README)
    (checkpoint,) = deployment.client().post_training.job.artifacts(job_uuid="my-first-job").checkpoints
    assert checkpoint["path"] in printed


@pytest.mark.parametrize(
    "document",
    [document for document in RUN if document not in (README, QUICK_START, OPERATIONS)],
    ids=lambda document: str(document.relative_to(ROOT)),
)
def test_a_document(reader: Reader, document: Path) -> None:
    reader.follow(document)


def test_operations_and_what_is_restored(deployment: Deployment, reader: Reader, tmp_path: Path) -> None:
    """A server that has nothing but the copy knows the job, and serves what it trained."""
    reader.follow(OPERATIONS)
    restored = Standalone(deployment.data / "restored", dags_folder=deployment.servers.layout.dags_folder)
    try:
        restored.start_server("mlflow")
        wait_until(lambda: answers(f"{restored.mlflow_url}/health"))
        client = MlflowClient(restored.mlflow_url)
        (run,) = deployment.runs_of("my-lora")
        assert client.get_run(run.info.run_id).info.status == "FINISHED"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", restored.mlflow_url)
            status = deployment.client().post_training.job.status(job_uuid="my-lora")
            folder = download_artifacts(status.checkpoints[-1]["path"], dst_path=str(tmp_path))
        assert (Path(folder) / "adapter_model.safetensors").stat().st_size > 0
    finally:
        restored.stop()
