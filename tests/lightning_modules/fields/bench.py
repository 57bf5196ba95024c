"""Trials of requests that differ in one field, and how a proof of the field is written."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lightning_modules.data.tokenize import Item
from lightning_modules.job import Finished, Job, prepare_job
from lightning_modules.record import open_record
from post_training.datasets import Resolver
from post_training.schemas.requests import AnyTrainingRequest, error_details
from post_training.schemas.rlhf import read_request
from post_training.schemas.trainer import TrainerSpec
from tests.lightning_modules.tiny import PAIRS, ROWS
from tests.requests_of import changed
from tests.tiny_model import write_tiny_model


class Watch(pl.Callback):
    """Keeps what the training loop really got and did.

    :ivar steps: each optimizer step's micro-batches.
    :ivar validated: optimizer steps done, and the batch.
    :ivar rates: the optimizer's learning rate at each step.
    :ivar before: each trained weight and its gradient before the first update.
    """

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []
        self.validated: list[tuple[int, Any]] = []
        self.rates: list[float] = []
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(batch)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append((pl_module.optimizer_steps, batch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.optimizer is None:
            named = pl_module.model.named_parameters()
            self.before = {n: (p.detach().clone(), p.grad.clone()) for n, p in named if p.requires_grad}
        self.optimizer = optimizer
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.rates.append(rate)


class Trial:
    """A job that is prepared, and trained, once something of it is read.

    The clock by which it saves moves on by a second each time that it is read.
    """

    def __init__(self, spec: TrainerSpec) -> None:
        self.spec = spec
        self._watch = Watch()

    @property
    def items(self) -> list[Item]:
        """What the job trains on."""
        shard = self.job.data.train_loader.shards[0]
        return [shard[index] for index in range(len(shard))]

    @cached_property
    def job(self) -> Job:
        """The job, untrained unless something else has been read."""
        clock = count().__next__
        return prepare_job(self.spec, open_record(self.spec), [self._watch], clock=clock)

    @cached_property
    def finished(self) -> Finished:
        """What the training made."""
        return self.job.run()

    @property
    def watch(self) -> Watch:
        """What was seen of the whole training."""
        assert self.finished is not None
        return self._watch

    @property
    def model(self) -> Any:
        return self.job.module.model

    @property
    def tokenizer(self) -> Any:
        return self.job.checkpoints.tokenizer

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is trained of the model, as it is now."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def projection(self, name: str) -> Any:
        """An attention projection of the first layer, adapters and fake quantizers inside."""
        ending = f"layers.0.self_attn.{name}"
        return next(module for path, module in self.model.named_modules() if path.endswith(ending))

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The record's events of a kind."""
        assert self.finished is not None
        read = [json.loads(line) for line in (self.spec.work_dir / "metrics.jsonl").read_text().splitlines()]
        return [line for line in read if line["kind"] == kind]

    def points(self, name: str) -> dict[int, float]:
        """A metric's values by step."""
        events = self.lines("metrics")
        return {event["step"]: event["values"][name] for event in events if name in event["values"]}


class Bench:
    """Makes trials of a valid request with other values in one field.

    The request trains adapters of rank 4 on ten rows, in file order and batches of two, for one epoch.

    :param path: dotted path of the field.
    :param base: a spec with the request; what it names is resolved anew for each trial, as an operator does.
    """

    def __init__(self, path: str, base: TrainerSpec, resolver: Resolver, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.method = base.request.method
        self.pairs = self.method == "preference_optimize"
        self.rows = PAIRS if self.pairs else ROWS
        self._resolver = resolver
        self._numbers = count()
        self._body = base.request.model_dump(mode="json", exclude_unset=True)
        self.model_field = "finetuned_model" if self.pairs else "model"
        self._body[self.model_field] = base.model
        self._body["training_config"]["data_config"]["dataset_id"] = base.train_data

    def at(self, path: str) -> Bench:
        """The same bench for another field."""
        other = copy.copy(self)
        other.path = path
        return other

    def request(self, value: Any, **changes: Any) -> AnyTrainingRequest:
        """The request with ``value`` in the field; a function is called with the bench for the value.

        :param changes: other fields, by dotted path with ``__`` for the dot.
        """
        made = {
            name: change(self) if callable(change) else copy.deepcopy(change)
            for name, change in {**changes, self.path.replace(".", "__"): value}.items()
        }
        return read_request(self.method, changed(self._body, **made))

    def trial(self, value: Any, **changes: Any) -> Trial:
        """A job of the request."""
        request = self.request(value, **changes)
        copies = None if self.pairs else self._resolver.checkpoint_dir(request)  # type: ignore[arg-type]
        return Trial(
            TrainerSpec(
                request=request,
                model=self._resolver.model(request),
                model_roots=self._resolver.model_roots(),
                train_data=self._resolver.train_data(request),
                validation_data=self._resolver.validation_data(request),
                checkpoint_dir=copies,
                work_dir=self.folder / f"work-{next(self._numbers)}",
                attempt=1,
                tracking=None,
            )
        )

    def file(self, rows: Iterable[Any]) -> str:
        """A jsonl file of rows; text is written as it is."""
        path = self.folder / f"rows-{next(self._numbers)}.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    def model(self, **shape: Any) -> str:
        """The folder of another tiny model."""
        return str(write_tiny_model(self.folder / f"model-{next(self._numbers)}", **shape))


Proof = Callable[[Bench], None]
"""Fails unless the bench's field does what it says."""


def shows(read: Callable[[Trial], Any], *expected: tuple[Any, Any], **changes: Any) -> Proof:
    """Try each value, and read from its trial exactly what is expected beside it."""

    def proof(bench: Bench) -> None:
        for value, wanted in expected:
            assert read(bench.trial(value, **changes)) == wanted, value

    return proof


def refuses(sentence: str, *values: Any, field: str | None = None, **changes: Any) -> Proof:
    """Each value is refused before anything starts, by a sentence about this field and no other.

    :param field: the path that is told where it is not the field's own.
    """

    def proof(bench: Bench) -> None:
        for value in values:
            with pytest.raises(ValidationError) as caught:
                bench.request(value, **changes)
            (told,) = error_details(caught.value.errors())
            assert ".".join(map(str, told["loc"])) == (field or bench.path)
            assert sentence in told["msg"]

    return proof


def fails(error: type[Exception], sentence: str, *values: Any, **changes: Any) -> Proof:
    """With each value the trainer ends before it trains, and says why."""

    def proof(bench: Bench) -> None:
        for value in values:
            with pytest.raises(error, match=re.escape(sentence)):
                assert bench.trial(value, **changes).job

    return proof


def every(*proofs: Proof) -> Proof:
    """All of the proofs."""

    def proof(bench: Bench) -> None:
        for each in proofs:
            each(bench)

    return proof


def at(path: str, proof: Proof) -> Proof:
    """The proof, for another field."""
    return lambda bench: proof(bench.at(path))
