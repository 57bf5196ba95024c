"""Answers to the sample prompts: transformers' own, and nothing that training would notice."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
from torchao.quantization.qat import QATConfig
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_modules.engine.attention import TREE
from lightning_modules.engine.prepare import speed_up
from lightning_modules.generation import prompt_ids
from lightning_modules.process import StopRequestedError
from lightning_modules.record import LocalRecord
from lightning_modules.samples import MAX_NEW_TOKENS, SamplePrompts, answer
from lightning_modules.spool import Spool
from post_training.errors import InvalidRequestError
from tests.lightning_modules.recorded import read_table
from tests.lightning_modules.tiny import LORA, TINY

PROMPTS = ["how many apples are in", "the red basket of my friend"]
LONG = " ".join(["how many apples are in the red basket of my friend?"] * 20)

Model = PreTrainedModel


@pytest.fixture
def model(tiny_model_dir: Path) -> Model:
    loaded: Model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    return loaded


@pytest.fixture(autouse=True)
def _clean_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What transformers would warn of goes to its log; here it is an error."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.get_records("call") if r.name.startswith("transformers")] == []


def new_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int = 128) -> list[int]:
    """Generate with transformers' own interface and the defaults of its models."""
    turns = [{"role": "user", "content": prompt}]
    batch = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ends = [tokenizer.eos_token_id, model.generation_config.eos_token_id]
    output = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return list(map(int, output[0, batch["input_ids"].shape[1] :]))


def expected(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int = 128) -> str:
    tokens = new_tokens(model.eval(), tokenizer, prompt, limit)
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def adapted(model: Model) -> Model:
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).get_base_model()


def quantization_aware(model: Model) -> Model:
    scheme = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(scheme, step="prepare"))
    return model


def with_checkpointing(model: Model) -> Model:
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def windowed(model: Model) -> Model:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(TINY["mistral"]), attn_implementation="sdpa")


PREPARED: dict[str, Callable[[Model], Model]] = {
    "full": lambda model: model,
    "adapted": adapted,
    "quantization-aware": quantization_aware,
    "checkpointed": with_checkpointing,
    "windowed": windowed,
}


def snapshot(model: Model) -> dict[str, Any]:
    """Everything that generation might leave changed."""
    return {
        "modes": [module.training for module in model.modules()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "trained": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "buffers": [buffer.tolist() for buffer in model.buffers()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED)
def test_an_answer_is_that_of_generate_and_the_model_stays_as_it_was(
    prepare: Callable[[Model], Model], fast: bool, model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = prepare(model).eval()
    answers = [expected(copy.deepcopy(model), tokenizer, prompt) for prompt in PROMPTS]
    if fast:
        assert speed_up(model, "sdpa", max_seq_length=8)
    before = snapshot(model)
    assert [answer(model, tokenizer, prompt) for prompt in PROMPTS] == answers
    assert snapshot(model) == before
    assert (model.config._attn_implementation == TREE) is fast


def test_decoding_is_greedy_whatever_the_model_s_own_settings_are(
    model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = expected(copy.deepcopy(model), tokenizer, PROMPTS[0])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, min_p=0.1, repetition_penalty=1.5, max_new_tokens=3
    )
    before = model.generation_config.to_dict()
    assert answer(model.eval(), tokenizer, PROMPTS[0]) == plain
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("listed", [False, True])
def test_the_model_s_own_end_tokens_end_an_answer_too(
    listed: bool, model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = new_tokens(copy.deepcopy(model), tokenizer, PROMPTS[0])
    assert len(tokens) == MAX_NEW_TOKENS
    end = tokens[4]
    model.generation_config.eos_token_id = [399, end] if listed else end
    short = tokenizer.decode(tokens[: tokens.index(end) + 1])
    assert answer(model.eval(), tokenizer, PROMPTS[0]) == short


def test_the_tokenizer_s_end_token_ends_an_answer(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = new_tokens(copy.deepcopy(model), tokenizer, PROMPTS[0])
    other = copy.deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(tokens[4])
    assert len(answer(model.eval(), other, PROMPTS[0])) < len(answer(model, tokenizer, PROMPTS[0]))


def test_an_answer_ends_where_the_model_s_positions_do(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TINY["gpt2"])).eval()
    prompt = LONG[:860]
    left = 256 - len(prompt_ids(tokenizer, [{"role": "user", "content": prompt}]))
    assert len(new_tokens(model, tokenizer, prompt, left)) == left < MAX_NEW_TOKENS  # no end token before
    assert answer(model, tokenizer, prompt) == expected(model, tokenizer, prompt, left)


class Module(pl.LightningModule):
    """What the callback needs, and a validation that does nothing."""

    def __init__(self, model: Model, stop_at: int = 10**6) -> None:
        super().__init__()
        self.model = self.language_model = model
        self.optimizer_steps = 3
        self.asked = 0
        self._stop_at = stop_at

    def stop_if_asked(self) -> None:
        self.asked += 1
        if self.asked == self._stop_at:
            raise StopRequestedError

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        assert not self.model.training


def validate(module: Module, callback: SamplePrompts, precision: Any = "32-true") -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
    )
    # With a generator of its own: a loader draws a number each time that it is read.
    trainer.validate(module, DataLoader(torch.zeros(1, 1), generator=torch.Generator()), verbose=False)


@pytest.fixture
def samples(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., SamplePrompts]:
    """Make the callback of a job whose folder is the test's."""
    record = LocalRecord(Spool(tmp_path / "metrics.jsonl", None), "job")
    return lambda prompts, tokenizer=tokenizer: SamplePrompts(prompts, tokenizer, record)


def test_the_answers_of_the_attempt_before_come_with_its_state_from_any_machine(
    samples: Any, model: Model, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    before = samples(PROMPTS)
    before.load_state_dict({"rows": [[0, "p", "a"], [2, "p", "b"]]})
    callback = samples(PROMPTS)
    callback.load_state_dict(before.state_dict())
    validate(Module(model), callback)
    new = [[3, prompt, expected(model, tokenizer, prompt)] for prompt in PROMPTS]
    assert read_table(tmp_path, "samples.json") == [[0, "p", "a"], [2, "p", "b"], *new]


def test_every_module_is_left_in_its_own_mode(samples: Any, model: Model) -> None:
    model.train()
    model.model.layers[1].eval()
    before = snapshot(model)
    validate(Module(model), samples(PROMPTS))
    assert snapshot(model) == before


def test_answers_are_computed_in_the_precision_of_the_training(samples: Any, model: Model) -> None:
    seen = set()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    validate(Module(model), samples(PROMPTS), "bf16-mixed")
    assert seen == {torch.bfloat16}


def test_a_stop_is_heeded_between_two_prompts(samples: Any, model: Model, tmp_path: Path) -> None:
    module = Module(model, stop_at=2)
    with pytest.raises(StopRequestedError):
        validate(module, samples([*PROMPTS, "not asked"]))
    assert module.asked == 2
    assert not (tmp_path / "tables").exists()


def test_a_prompt_that_is_too_long_is_refused_by_its_number(samples: Any, model: Model) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^logger_config.sample_prompts.1: .* the model's 256 tokens, got \d+$"
    ):
        validate(Module(model), samples(["short", LONG]))


def test_a_template_that_refuses_a_lone_user_turn_is_named(
    samples: Any, model: Model, tokenizer: PreTrainedTokenizerBase
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('a system turn is needed') }}"
    with pytest.raises(InvalidRequestError, match=r"^logger_config.sample_prompts.0: .*a system turn"):
        validate(Module(model), samples(PROMPTS, strict))


JOB = {"training": {"n_epochs": 2}, "logger": {"sample_prompts": PROMPTS}}
LOADERS: dict[str, tuple[Any, Any]] = {
    "adapted": (LORA, AutoPeftModelForCausalLM),
    "full": (None, AutoModelForCausalLM),
}


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize(("algorithm", "loader"), LOADERS.values(), ids=LOADERS)
def test_a_job_samples_before_training_and_after_each_epoch(
    algorithm: Any, loader: Any, packed: bool, make_spec: Any, run: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    training = {"n_epochs": 2, "efficiency_config": {"enable_activation_checkpointing": True}}
    spec = make_spec(**JOB | {"training": training}, algorithm=algorithm, data={"packed": packed})
    run(spec)
    rows = read_table(spec.work_dir, "samples.json")
    metrics = [json.loads(line) for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in metrics if "validation_loss" in event.get("values", {})]
    assert len(steps) == 3
    models = [AutoModelForCausalLM.from_pretrained(spec.model)]
    models += [loader.from_pretrained(spec.work_dir / "checkpoints" / f"epoch-{n}") for n in range(2)]
    assert rows == [
        [step, prompt, expected(model, tokenizer, prompt)]
        for step, model in zip(steps, models, strict=True)
        for prompt in PROMPTS
    ]
    assert len({text for _, _, text in rows}) > 2  # training changes the answers


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    [file] = (work_dir / "checkpoints" / "epoch-1").glob("*.safetensors")
    return load_file(file)


def assert_same_weights(one: Path, other: Path) -> None:
    expected = weights(one)
    assert expected
    for name, weight in weights(other).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("algorithm", [LORA, None], ids=["adapted", "full"])
def test_training_is_the_same_with_and_without_samples(
    algorithm: Any, make_spec: Any, run: Any, dropout_model: str, tmp_path: Path
) -> None:
    efficiency = {"enable_activation_checkpointing": True}
    common = {
        "training": {"n_epochs": 2, "efficiency_config": efficiency},
        "data": {"shuffle": True},
        "algorithm": algorithm,
        "model": dropout_model,
    }
    for name, logger in {"with": JOB["logger"], "without": {}}.items():
        run(make_spec(**common, logger=logger, work_dir=tmp_path / name))
    assert_same_weights(tmp_path / "without", tmp_path / "with")


@pytest.mark.parametrize("after", [1, 7, 10, 11, 13, 18, 20])
def test_a_stopped_job_goes_on_to_the_same_table(
    after: int, make_spec: Any, run: Any, dropout_model: str, tmp_path: Path
) -> None:
    run(make_spec(**JOB, model=dropout_model, work_dir=tmp_path / "whole"))
    spec = make_spec(**JOB, model=dropout_model, work_dir=tmp_path / "cut")
    asked = iter(range(10**6))
    with pytest.raises(StopRequestedError):
        run(spec, lambda: next(asked) >= after)
    run(spec)
    assert read_table(spec.work_dir, "samples.json") == read_table(tmp_path / "whole", "samples.json")
    assert_same_weights(tmp_path / "whole", spec.work_dir)
