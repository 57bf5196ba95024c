"""One proof for each field of the schema: changing it changes what it should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lightning_modules.engine.attention import TREE
from post_training.errors import ModelError
from post_training.schemas.flat import flatten, leaves
from post_training.schemas.requests import REQUESTS, PreferenceOptimizeRequest, error_details
from post_training.schemas.rlhf import PostTrainingRLHFRequest, read_request
from post_training.schemas.training import LoggerConfig
from tests.lightning_modules.fields import proofs, readers
from tests.lightning_modules.fields.algorithms import EVERY_WEIGHT, UPDATES, adapters, prefers
from tests.lightning_modules.fields.bench import Bench, Proof, every, fails, refuses, shows
from tests.lightning_modules.fields.proofs import LR, STEADY, WARMUP
from tests.lightning_modules.tiny import LORA
from tests.requests_of import rlhf_body
from tests.test_datasets import resolver_of

EPOCHS = "training_config__n_epochs"
QAT = {"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 16}
ON_QAT = {"algorithm_config": QAT, "runtime__adapter": LORA}
EPOCH_0, EPOCH_1 = "checkpoints/epoch-0", "checkpoints/epoch-1"


def file_of(*numbers: int) -> Any:
    """A file of the rows with these numbers."""
    return lambda bench: bench.file(bench.rows[number] for number in numbers)


def model_of(layers: int) -> Any:
    return lambda bench: bench.model(num_hidden_layers=layers)


def copies(bench: Bench) -> str:
    return str(bench.folder / "copies")


def said(key: str) -> Any:
    """Read an argument with which the job's MLflow run is made."""
    return lambda trial: readers.new_run_of(trial)[key]


TRAINING: dict[str, Proof] = {
    "n_epochs": shows(readers.steps, (1, 5), (3, 15)),
    "max_steps_per_epoch": shows(readers.steps, (1, 2), (4, 8), (6, 10), (0, 10), (None, 10), **{EPOCHS: 2}),
    "gradient_accumulation_steps": shows(
        readers.trained_rows,
        (1, [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]], [[8, 9]]]),
        (3, [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]),
    ),
    "max_validation_steps": shows(
        readers.validated_rows, (0, []), (1, [0, 1]), (2, [0, 1, 2, 3]), (None, list(range(10)))
    ),
    "data_config.dataset_id": shows(readers.trained_rows, (file_of(3, 5), [[[3, 5]]]), (file_of(7), [[[7]]])),
    "data_config.batch_size": every(
        shows(readers.trained_rows, (4, [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]]), (10, [[[*range(10)]]])),
        shows(readers.validated_rows, (1, [0]), (3, [0, 1, 2])),
    ),
    "data_config.shuffle": proofs.shuffles,
    "data_config.data_format": proofs.formats,
    "data_config.validation_dataset_id": shows(
        readers.validated_rows, (None, [0, 1]), (file_of(6, 3, 8), [3, 6]), (file_of(9), [9])
    ),
    "data_config.packed": proofs.packs,
    "optimizer_config.optimizer_type": proofs.updates,
    "optimizer_config.lr": shows(readers.rates, (0.5, [0.5] * 5), (2e-4, [2e-4] * 5), **STEADY),
    "optimizer_config.weight_decay": proofs.decays,
    "optimizer_config.num_warmup_steps": shows(
        readers.rates,
        (0, [LR] * 5),
        (4, pytest.approx([LR / 4, LR / 2, LR * 3 / 4, LR, LR])),
        (10, pytest.approx([LR / 10 * k for k in range(1, 6)])),
        runtime__scheduler="constant",
    ),
    "efficiency_config.enable_activation_checkpointing": proofs.recomputes,
    "efficiency_config.enable_activation_offloading": proofs.offloads,
    "efficiency_config.memory_efficient_fsdp_wrap": proofs.shards,
    "efficiency_config.fsdp_cpu_offload": proofs.offloads_weights,
    "dtype": proofs.computes_in,
}

RUNTIME: dict[str, Proof] = {
    "max_seq_length": proofs.cuts,
    "seed": proofs.seeds,
    "devices": every(proofs.takes_rows, refuses("greater than or equal to 1, got 0", 0)),
    "num_nodes": every(proofs.takes_rows, refuses("greater than or equal to 1, got 0", 0)),
    # What they do on several devices, test_several.py shows.
    "strategy": every(
        shows(lambda trial: trial.job.trainer.world_size, ("auto", 1)),
        refuses("must be auto on one device", "ddp", "fsdp"),
    ),
    # What ray does, test_ray.py shows.
    "launcher": every(
        shows(readers.steps, ("local", 5)), refuses("should be 'local' or 'ray', got 'torchrun'", "torchrun")
    ),
    "attn_implementation": shows(readers.attention, ("sdpa", TREE), ("eager", "eager")),
    "save_total_limit": shows(
        readers.exports, (None, ["epoch-0", "epoch-1", "epoch-2"]), (2, ["epoch-1", "epoch-2"]), **{EPOCHS: 3}
    ),
    "save_every_n_steps": every(
        shows(readers.saves, (None, [5]), (2, [2, 4, 5]), (3, [3, 5]), (9, [5])),
        refuses("greater than or equal to 1", 0),
    ),
    "save_every_n_minutes": every(
        # the clock is read at the start, after each step but the last, and twice more at each save
        shows(readers.saves, (None, [5]), (1.2 / 60, [2, 4, 5]), (3 / 60, [3, 5]), (1, [5])),
        shows(readers.saves, (None, [4, 5]), (3 / 60, [3, 4, 5]), runtime__save_every_n_steps=4),
        refuses("greater than 0", 0, -1),
    ),
    "scheduler": shows(
        readers.rates,
        ("constant", [LR] * 5),
        ("linear", pytest.approx([LR, LR * 0.8, LR * 0.6, LR * 0.4, LR * 0.2])),
        ("cosine", pytest.approx([LR * (1 + math.cos(math.radians(36 * k))) / 2 for k in range(5)])),
        **{WARMUP: 0},
    ),
    "max_bad_row_fraction": proofs.skips_bad_rows,
}

LOGGER: dict[str, Proof] = {
    "experiment_name": shows(said("experiment"), (None, None), ("mine", "mine")),
    "run_name": shows(said("name"), (None, "job"), ("mine", "mine")),
    "tags": every(
        shows(said("tags"), ({}, {}), ({"team": "a", "x": "y"}, {"team": "a", "x": "y"})),
        refuses("got 'mlflow.user'", {"mlflow.user": "me"}),
    ),
    "log_every_n_steps": shows(readers.points, (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])),
    "sample_prompts": every(
        shows(readers.answered, ([], []), (["a", "b"], [[0, "a"], [0, "b"], [5, "a"], [5, "b"]])),
        refuses("max_validation_steps is 0", ["a"], training_config__max_validation_steps=0),
    ),
    "log_figures": shows(readers.draws, (True, True), (False, False)),
}

BOTH: dict[str, Proof] = {
    **{f"training_config.{name}": proof for name, proof in TRAINING.items()},
    **{f"runtime.{name}": proof for name, proof in RUNTIME.items()},
    **{f"logger_config.{name}": proof for name, proof in LOGGER.items()},
    # What a search does, tests/operators/test_search.py shows: its trials are requests without one.
    "hyperparam_search_config": every(
        shows(readers.steps, ({}, 5)),
        refuses("Field required", {"n_trials": 3}, field="hyperparam_search_config.space"),
    ),
    "job_uuid": every(
        shows(readers.identity, ("job", {"job"}), ("a.b~c:1+2_3-4", {"a.b~c:1+2_3-4"})),
        refuses("may hold only", "a/b"),
    ),
}

SUPERVISED: dict[str, Proof] = {
    **adapters("algorithm_config", "model"),
    "algorithm_config.type": every(
        adapters("algorithm_config", "model")["algorithm_config.type"],
        shows(readers.parameters, ("QAT", (EVERY_WEIGHT, 14)), algorithm_config=QAT),
    ),
    "algorithm_config.quantizer_name": shows(
        readers.scheme,
        *((name, (False, "IntxWeightOnlyConfig")) for name in ("int4_weight_only", "4w-qat")),
        ("8da4w-qat", (True, "Int8DynamicActivationIntxWeightConfig")),
        algorithm_config=QAT,
    ),
    "algorithm_config.group_size": every(
        shows(readers.grid, (16, ((32, 2), -8, 7)), (32, ((32, 1), -8, 7)), algorithm_config=QAT),
        fails(ModelError, "group_size 24 does not fit", 24, algorithm_config=QAT),
    ),
    **adapters("runtime.adapter", "model", fake=14, **ON_QAT),
    **{
        f"runtime.adapter.{name}": every(
            shows(readers.parameters, *((off, (UPDATES, 14)) for off in (False, None)), **ON_QAT),
            refuses("must be false: a QAT job", True, **ON_QAT),
        )
        for name in ("use_dora", "quantize_base")
    },
    "training_config.data_config.train_on_input": proofs.scores_input,
    "runtime.export": every(
        proofs.forms,
        refuses("this job trains none", "adapter", "merged", algorithm_config=None),
        refuses("a QAT job exports the quantized model", "merged", algorithm_config=QAT),
    ),
    "runtime.reference_logprobs": every(
        shows(readers.references, (None, (False, False))),
        refuses("a fine-tuning job has no reference", "precomputed", "live"),
    ),
    "logger_config.log_model": every(
        shows(
            readers.kept,
            *(("all", [EPOCH_0, EPOCH_1]), (True, ["job/epoch-0", EPOCH_1])),
            (False, ["job/epoch-0", "job/epoch-1"]),
            **{EPOCHS: 2, "checkpoint_dir": copies},
        ),
        refuses("needs a checkpoint_dir", False),
    ),
    "model": shows(readers.layers, (None, 2), (model_of(1), 1)),
    "checkpoint_dir": shows(readers.copies, (None, []), (copies, ["copies/job/epoch-0"])),
    "job_uuid": every(
        BOTH["job_uuid"],
        shows(readers.identity, ("job", {"job"}), ("job-2", {"job-2"}), checkpoint_dir=copies),
    ),
}

PREFERENCE: dict[str, Proof] = {
    **adapters("runtime.adapter", "finetuned_model"),
    "training_config.data_config.train_on_input": every(
        shows(readers.steps, (False, 5), (None, 5)),
        refuses("must be false: the prompt is the same for both", True),
    ),
    "runtime.export": every(
        proofs.forms, refuses("this job trains none", "adapter", "merged", runtime__adapter=None)
    ),
    "runtime.reference_logprobs": every(
        shows(readers.references, *((once, (True, True)) for once in (None, "precomputed"))),
        shows(readers.references, ("live", (False, False))),
        refuses("needs runtime.adapter", "live", runtime__adapter=None),
    ),
    "logger_config.log_model": every(
        shows(readers.kept, ("all", [EPOCH_0, EPOCH_1]), (True, [EPOCH_1]), **{EPOCHS: 2}),
        refuses('must be "all" or true', False),
    ),
    "finetuned_model": shows(readers.layers, (model_of(1), 1), (model_of(2), 2)),
    "algorithm_config.reward_scale": prefers(1.0, 2.0, 7.0),
    "algorithm_config.reward_clip": prefers(None, 0.05, 0.01),
    "algorithm_config.epsilon": every(
        prefers(0.0, 0.1, 0.5),
        shows(
            lambda trial: "algorithm_config.epsilon is in the losses" in readers.warning(trial),
            *((1e-8, False), (0.5, True)),
            algorithm_config__loss_type="hinge",
        ),
    ),
    "algorithm_config.gamma": prefers(1.0, 0.9, 0.5, algorithm_config__beta=2.0),
    "algorithm_config.beta": prefers(0.1, 0.5, 2.0),
    "algorithm_config.loss_type": prefers("sigmoid", "hinge", "ipo", "kto_pair"),
}

PROOFS: dict[str, dict[str, Proof]] = {
    "supervised_fine_tune": BOTH | SUPERVISED,
    "preference_optimize": BOTH | PREFERENCE,
}
"""For each training method, what proves each of its fields, by dotted path."""

LONG_FORM: dict[str, tuple[str, Any]] = {
    "finetuned_model.uri": ("finetuned_model", "org/other"),
    "dataset_id": ("training_config.data_config.dataset_id", "other.jsonl"),
    "validation_dataset_id": ("training_config.data_config.validation_dataset_id", "other.jsonl"),
    "optimizer_config.optimizer_type": ("training_config.optimizer_config.optimizer_type", "sgd"),
    "optimizer_config.lr": ("training_config.optimizer_config.lr", 0.5),
    "optimizer_config.weight_decay": ("training_config.optimizer_config.weight_decay", 0.5),
    "optimizer_config.num_warmup_steps": ("training_config.optimizer_config.num_warmup_steps", 5),
}
"""Fields of the long form alone: the field of the short form that each stands for, and another value."""
SINGLE_VALUED = {"algorithm": "dpo"}
"""Fields of the long form that have one value only."""


@pytest.fixture
def bench_of(make_spec: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make the bench of a method's field; the deployment's default model is the tiny one."""

    def make(method: str, path: str) -> Bench:
        base = make_spec(preference={} if method == "preference_optimize" else None)
        resolver = resolver_of(tmp_path_factory.getbasetemp().resolve(), default_model=base.model)
        return Bench(path, base, resolver, tmp_path)

    return make


def paths(model: type[BaseModel]) -> set[str]:
    """Every field of a request, those in ``logger_config`` and the job's id too."""
    logged = {f"logger_config.{name}" for name in LoggerConfig.model_fields}
    return (set(leaves(model)) - {"logger_config"}) | logged | {"job_uuid"}


def test_every_field_has_a_proof() -> None:
    assert {m: set(table) for m, table in PROOFS.items()} == {m: paths(REQUESTS[m]) for m in REQUESTS}
    of_the_long_form = paths(PostTrainingRLHFRequest) - paths(PreferenceOptimizeRequest)
    assert LONG_FORM.keys() | SINGLE_VALUED.keys() == of_the_long_form


@pytest.mark.parametrize(("method", "path"), [(m, path) for m, table in PROOFS.items() for path in table])
def test_changing_a_field_changes_what_it_should(method: str, path: str, bench_of: Any) -> None:
    PROOFS[method][path](bench_of(method, path))


@pytest.mark.parametrize(("path", "twin", "value"), [(path, *twin) for path, twin in LONG_FORM.items()])
def test_a_field_of_the_long_form_is_its_twin(path: str, twin: str, value: Any) -> None:
    plain, other = (
        flatten(read_request("preference_optimize", rlhf_body(**changes)))
        for changes in ({}, {path.replace(".", "__"): value})
    )
    assert {name: told for name, told in other.items() if told != plain[name]} == {twin: value}


@pytest.mark.parametrize(("path", "value"), SINGLE_VALUED.items())
def test_a_field_of_one_value_refuses_others(path: str, value: str) -> None:
    assert read_request("preference_optimize", rlhf_body(**{path: value})).method == "preference_optimize"
    with pytest.raises(ValidationError) as caught:
        read_request("preference_optimize", rlhf_body(**{path: "other"}))
    (told,) = error_details(caught.value.errors())
    assert (told["loc"], told["msg"]) == ([path], f"Input should be {value!r}, got 'other'")
