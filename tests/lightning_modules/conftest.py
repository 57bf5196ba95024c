"""A tiny model, its tokenizer, specs that train it in seconds, and a run on a real MLflow server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.utilities import registry
from mlflow import MlflowClient
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedTokenizerBase

from lightning_modules.record import open_record
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.trainer import TrackingTarget, TrainerSpec
from tests.lightning_modules.tiny import LORA, PAIRS, ROWS
from tests.requests_of import PLAIN_END, sft_body
from tests.tiny_model import train_tokenizer, write_tiny_model

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer

HERE = Path(__file__).parent
LIBRARY_WARNINGS = (
    r"ignore:.*treespec, LeafSpec.* is deprecated",
    r"ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    r"ignore:unclosed <socket:ResourceWarning",
    r"ignore:unclosed event loop:ResourceWarning",
)
"""What lightning and peft do to torch and transformers, MLflow's client to connections that it forgets, and
other folders' tests to event loops, which are found when memory is collected here; nothing of ours."""

torch.set_num_threads(1)  # more threads only wait for each other on a model of this size


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make warnings errors in this folder."""
    for item in items:
        if item.path.is_relative_to(HERE):
            for rule in reversed(("error", *LIBRARY_WARNINGS)):
                item.add_marker(pytest.mark.filterwarnings(rule), append=False)


@pytest.fixture(scope="session", autouse=True)
def _plugins_are_looked_for_once() -> Iterator[None]:
    """Each of Lightning's trainers looks through all installed packages for callbacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", cache(registry.entry_points))
        yield


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    store = tmp_path_factory.mktemp("store") / "file"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 400 tokens with a ChatML template."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama in safetensors and its tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def dropout_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with dropout in its attention, so that the random state matters."""
    folder = tmp_path_factory.mktemp("dropout")
    for path in tiny_model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return str(folder)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ten rows as a jsonl file."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ten preference pairs as a jsonl file."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in PAIRS))
    return path


SpecMaker = Callable[..., TrainerSpec]


@pytest.fixture
def make_spec(tiny_model_dir: Path, rows_file: Path, pairs_file: Path, tmp_path: Path) -> SpecMaker:
    """Make a spec; keywords change training_config, data_config, runtime, algorithm and the spec itself.

    With ``preference``, the parameters of its loss, it is a preference job that trains the adapters of
    ``algorithm``.
    """

    def make(
        *,
        training: Mapping[str, Any] = {},
        data: Mapping[str, Any] = {},
        runtime: Mapping[str, Any] = {},
        algorithm: Mapping[str, Any] | None = LORA,
        preference: Mapping[str, Any] | None = None,
        logger: Mapping[str, Any] = {},
        **spec: Any,
    ) -> TrainerSpec:
        data_config = {"dataset_id": "rows", "batch_size": 2, "shuffle": False, "data_format": "instruct"}
        training_config = {
            "n_epochs": 1,
            "max_steps_per_epoch": 0,
            "max_validation_steps": 1,
            "dtype": "fp32",
            "data_config": data_config | dict(data),
            "optimizer_config": {
                "optimizer_type": "adamw",
                "lr": 0.01,
                "weight_decay": 0.1,
                "num_warmup_steps": 2,
            },
        }
        request = {
            "job_uuid": "job",
            "training_config": training_config | dict(training),
            "hyperparam_search_config": {},
            "logger_config": {**PLAIN_END, **logger},
            "runtime": {"seed": 7, "max_seq_length": 128} | dict(runtime),
            "algorithm_config": algorithm,
        }
        if preference is not None:
            request |= {"finetuned_model": "tiny", "algorithm_config": dict(preference)}
            request["runtime"] |= {"adapter": algorithm} | dict(runtime)
        fields = {
            "request": request,
            "model": str(tiny_model_dir),
            "train_data": str(rows_file if preference is None else pairs_file),
            "validation_data": None,
            "checkpoint_dir": None,
            "work_dir": tmp_path / "work",
            "attempt": 1,
            "tracking": None,
        }
        made = TrainerSpec.model_validate(fields | {"begun": spec.get("attempt", 1) > 1} | spec)
        made.work_dir.mkdir(parents=True, exist_ok=True)
        return made

    return make


@pytest.fixture
def read_metrics() -> Callable[[Path, str], list[float]]:
    """Read the points of a metric from a job's folder, by step."""

    def read(work_dir: Path, name: str) -> list[float]:
        lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        return [line["values"][name] for line in lines if name in line.get("values", {})]

    return read


@pytest.fixture
def run(make_spec: SpecMaker) -> Callable[..., Any]:
    """Train a spec with its local record; returns what the job does."""
    from lightning_modules.job import prepare_job

    def train(spec: TrainerSpec, should_stop: Callable[[], bool] = lambda: False) -> Any:
        record = open_record(spec)
        try:
            return prepare_job(spec, record, should_stop=should_stop).run()
        finally:
            record.close()

    return train


@pytest.fixture
def server(mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowServer]:
    """The shared server, running again at the end whatever a test did to it; clients give up soon."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)  # for what no client offers
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    yield mlflow_server
    if not mlflow_server.running:
        mlflow_server.start()


@pytest.fixture
def client(server: MLflowServer) -> MlflowClient:
    """A client of the server."""
    return MlflowClient(server.uri)


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    """A new run."""
    return str(client.create_run("0").info.run_id)


@pytest.fixture
def spec(server: MLflowServer, run_id: str, tmp_path: Path) -> TrainerSpec:
    """A spec that nothing trains: its record is the new run."""
    return TrainerSpec(
        request=SupervisedFineTuneRequest.model_validate(sft_body()),
        model="/model",
        train_data="/train.jsonl",
        validation_data=None,
        checkpoint_dir=None,
        work_dir=tmp_path / "job",
        attempt=1,
        tracking=TrackingTarget(tracking_uri=server.uri, run_id=run_id),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder, one file in a folder below it."""
    made = tmp_path / "checkpoint"
    (made / "tokenizer").mkdir(parents=True)
    (made / "adapter.safetensors").write_bytes(os.urandom(100_000))
    (made / "tokenizer" / "vocab.json").write_text("{}")
    return made
