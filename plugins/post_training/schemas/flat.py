"""A request as one level of dotted keys, the form that Airflow's trigger form and a run's conf hold.

``{"training_config": {"n_epochs": 1}}`` becomes ``{"training_config.n_epochs": 1}``. Airflow replaces a
nested conf value as a whole instead of merging it with the params' defaults, and shows nested objects as a
JSON editor; one level avoids both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from post_training.errors import InvalidRequestError
from post_training.schemas.requests import AnyTrainingRequest

REQUIRED_GROUPS = frozenset({"training_config.data_config"})
"""Groups that the schema lets be absent and every training request must have."""


@dataclass(frozen=True)
class Leaf:
    """One field of a request that holds no further fields.

    :param path: dotted path from the request's root.
    :param schema: its JSON schema, without ``$ref``; ``type`` is a list where null is allowed.
    :param tags: algorithm types that it belongs to; empty outside the algorithm union.
    :param optional: whether a group that it lies in may be absent, so that null may stand for the leaf.
    """

    path: str
    schema: dict[str, Any] = field(hash=False)
    required: bool
    tags: tuple[str, ...] = ()
    optional: bool = False

    @property
    def keeps_null(self) -> bool:
        """Whether null is a value of its own; elsewhere it says that the field is absent."""
        return "null" in self.schema.get("type", ()) and not self.path.startswith("runtime.")


def leaves(model: type[BaseModel]) -> dict[str, Leaf]:
    """Return every leaf of a request class by its path, in the schema's order, without ``job_uuid``."""
    found: dict[str, Leaf] = {}
    _walk(model, Leaf("", {}, True), found)
    found.pop("job_uuid", None)
    return found


def _walk(model: type[BaseModel], group: Leaf, found: dict[str, Leaf]) -> None:
    document = model.model_json_schema()
    for name, info in model.model_fields.items():
        path = f"{group.path}.{name}".lstrip(".")
        variants = _models_in(info)
        for variant in variants:
            tags = (variant.model_fields["type"].default,) if len(variants) > 1 else group.tags
            may_be_absent = type(None) in get_args(info.annotation) and path not in REQUIRED_GROUPS
            optional = group.optional or may_be_absent
            _walk(variant, Leaf(path, {}, True, tags, optional), found)
        if variants:
            continue
        schema = _resolved(document["properties"][name], document.get("$defs", {}))
        tags = group.tags
        if path in found:
            twin = found[path]
            schema = {**schema, "enum": [*twin.schema["enum"], *schema["enum"]]}
            tags = (*twin.tags, *tags)
        found[path] = Leaf(path, schema, info.is_required(), tags, group.optional)


def _models_in(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the model classes of ``X``, ``X | None``, or a tagged union of models."""
    pending, models = [info.annotation], []
    while pending:
        annotation = pending.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            models.append(annotation)
        elif not isinstance(annotation, type):
            pending.extend(get_args(annotation))
    return models


def _resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """Inline ``$ref`` and turn ``anyOf [X, null]`` into X with ``type: [x, "null"]``."""
    if "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return {**_resolved(defs[schema["$ref"].rpartition("/")[2]], defs), **rest}
    if "anyOf" in schema:
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        merged: dict[str, Any] = {}
        for option in schema["anyOf"]:
            merged.update({key: value for key, value in _resolved(option, defs).items() if key != "type"})
        types = [_resolved(option, defs)["type"] for option in schema["anyOf"]]
        if "enum" in merged and "null" in types:
            merged["enum"] = [*merged["enum"], None]
        return {**merged, **rest, "type": types}
    if "const" in schema:
        return {**{k: v for k, v in schema.items() if k != "const"}, "enum": [schema["const"]]}
    return schema


def flatten(request: AnyTrainingRequest) -> dict[str, Any]:
    """Return the request with every leaf present; null stands for what is absent.

    Unset fields of ``runtime`` stay absent, so that the deployment's defaults still apply.
    """
    body = request.model_dump(mode="json")
    if request.runtime is not None:
        body["runtime"] = request.runtime.model_dump(mode="json", exclude_unset=True)
    return {path: _at(body, path.split(".")) for path in leaves(type(request))}


def _at(body: Any, keys: list[str]) -> Any:
    for key in keys:
        if not isinstance(body, dict):
            return None
        body = body.get(key)
    return body


def unflatten(
    model: type[AnyTrainingRequest], flat: dict[str, Any], *, form_defaults: dict[str, Any]
) -> dict[str, Any]:
    """Return the nested body of a flat one.

    A field of another algorithm than the chosen one is left out when it still holds the form's default,
    and refused when it was changed. A group whose leaves are all null is null itself.

    :param form_defaults: what the form shows before anything is typed, by dotted path.
    :raises InvalidRequestError: on an unknown key or a field of another algorithm.
    """
    known = leaves(model)
    unknown = sorted(set(flat) - set(known))
    if unknown:
        raise InvalidRequestError.of(unknown[0], "unknown parameter", "extra_forbidden")
    chosen = flat.get("algorithm_config.type")
    body: dict[str, Any] = {}
    for path, leaf in known.items():
        value = flat.get(path)
        if leaf.tags and chosen not in leaf.tags:
            if value is not None and value != form_defaults.get(path):
                raise InvalidRequestError.of(
                    path, f"belongs to {' or '.join(leaf.tags)}, but algorithm_config.type is {chosen}"
                )
            continue
        if value is None and not leaf.keeps_null:
            continue
        *groups, name = path.split(".")
        target = body
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    return _without_empty_groups(body, model)


def _without_empty_groups(body: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    pruned: dict[str, Any] = {}
    for name, value in body.items():
        variants = _models_in(model.model_fields[name]) if name in model.model_fields else []
        if isinstance(value, dict) and variants:
            value = _without_empty_groups(value, variants[0]) if len(variants) == 1 else value
            optional = type(None) in get_args(model.model_fields[name].annotation)
            if optional and all(item is None for item in value.values()):
                value = None
        pruned[name] = value
    return pruned
