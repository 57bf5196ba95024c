"""The params of the request DAGs: one typed field of the trigger form for each leaf of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import Param

from post_training.schemas.base import MAX_COUNT
from post_training.schemas.flat import DEPLOYMENTS, Leaf, leaves
from post_training.schemas.requests import AnyTrainingRequest
from post_training.schemas.training import DATA_DEFAULTS

_OF_BOTH_METHODS: dict[str, Any] = {
    "training_config.n_epochs": 1,
    "training_config.max_steps_per_epoch": 0,
    "training_config.max_validation_steps": 8,
    **{f"training_config.data_config.{name}": value for name, value in DATA_DEFAULTS.items()},
    "hyperparam_search_config": {},
    "logger_config": {},
}

_LORA: dict[str, Any] = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": False,
    "rank": 8,
    "alpha": 16,
    "use_dora": False,
    "quantize_base": False,
}

FORM_DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised_fine_tune": {
        **_OF_BOTH_METHODS,
        **{f"algorithm_config.{name}": value for name, value in _LORA.items()},
        "runtime.adapter.type": DEPLOYMENTS,
    },
    "preference_optimize": {
        **_OF_BOTH_METHODS,
        **{f"runtime.adapter.{name}": value for name, value in _LORA.items()},
    },
}
"""What the form shows before anything is typed; other leaves show the schema's default."""

SEARCHED = {
    "supervised_fine_tune": "algorithm_config.rank",
    "preference_optimize": "runtime.adapter.rank",
}
"""Field that the form of a search varies before anything is typed."""


SECTIONS: dict[str, str] = {
    "model": "Model",
    "finetuned_model": "Model",
    "checkpoint_dir": "Model",
    "training_config.data_config": "Data",
    "training_config.optimizer_config": "Optimizer",
    "training_config.efficiency_config": "Memory and compute",
    "training_config": "Training",
    "algorithm_config": "Algorithm",
    "runtime.adapter": "Adapters",
    "runtime": "Runtime",
    "logger_config": "Record",
    "hyperparam_search_config": "Search",
}
"""Path prefix -> section of the form; the first that fits is taken."""

ORDER = (
    "Model",
    "Data",
    "Training",
    "Algorithm",
    "Adapters",
    "Optimizer",
    "Runtime",
    "Memory and compute",
    "Record",
    "Search",
)
"""Sections as the form shows them: what every job is asked for comes first."""


def request_params(model: type[AnyTrainingRequest], *, search: bool = False) -> dict[str, Param]:
    """Return the params of a request class, keyed by dotted path.

    :param search: whether the form shows a search, to be changed, instead of none; its section is the first.
    """
    defaults = FORM_DEFAULTS[model.method]
    if search:
        space = {SEARCHED[model.method]: {"type": "categorical", "choices": [4, 8, 16]}}
        defaults = {**defaults, "hyperparam_search_config": {"space": space, "n_trials": 3}}
    order = (*ORDER[-1:], *ORDER[:-1]) if search else ORDER
    ordered = sorted(leaves(model).values(), key=lambda leaf: order.index(_section(leaf.path)))
    return {leaf.path: form_param(leaf, defaults, _section(leaf.path)) for leaf in ordered}


def _section(path: str) -> str:
    return next(
        section for prefix, section in SECTIONS.items() if path == prefix or path.startswith(f"{prefix}.")
    )


def form_param(leaf: Leaf, defaults: dict[str, Any], section: str) -> Param:
    """Return one field of a trigger form.

    :param defaults: what the form shows before anything is typed, by dotted path; others show the schema's.
    """
    schema = {key: value for key, value in leaf.schema.items() if key not in ("default", "title")}
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if (leaf.optional or leaf.tags) and "null" not in types:
        types = [*types, "null"]
    if "enum" in schema and "null" in types and None not in schema["enum"]:
        schema["enum"] = [*schema["enum"], None]
    if "$ref" in schema.get("items", {}):  # the form knows no definitions: items are checked when it is used
        del schema["items"]
    if "object" in types:  # its JSON as a string is for HTTP clients
        types = [kind for kind in types if kind != "string"]
    schema["type"] = types if len(types) > 1 else types[0]
    schema["title"] = leaf.path.rpartition(".")[2]
    schema["section"] = section
    sentences = (leaf.schema["description"], range_of(schema), _left_empty(leaf))
    schema["description"] = " ".join(filter(None, sentences))
    if leaf.path in defaults:
        return Param(defaults[leaf.path], **schema)
    if "null" in types:
        # Null is "not given"; a default would make a group present that may be absent.
        return Param(None if leaf.optional else leaf.schema.get("default"), **schema)
    if "default" in leaf.schema:
        return Param(leaf.schema["default"], **schema)
    return Param(**schema)


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def range_of(schema: Mapping[str, Any]) -> str:
    """Return the sentence of which numbers a JSON schema takes; none for the largest that we can store."""
    if "minimum" in schema and schema["minimum"] == schema.get("maximum"):
        return f"Only {schema['minimum']}."
    bounds = [
        f"{word} {schema[name]:g}"
        for name, word in _BOUNDS.items()
        if name in schema and schema[name] < MAX_COUNT
    ]
    return f"{', '.join(bounds).capitalize()}." if bounds else ""


def _left_empty(leaf: Leaf) -> str:
    """Return the sentence of what stands for a field of ``runtime`` that is left empty."""
    default = leaf.schema.get("default")
    if leaf.tags or not leaf.path.startswith("runtime.") or default is None:
        return ""
    return f"Empty takes the deployment's, which is {default} unless it says otherwise."
