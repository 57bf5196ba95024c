"""A request as one level of dotted keys, the form that Airflow's trigger form and a run's conf hold.

``{"training_config": {"n_epochs": 1}}`` becomes ``{"training_config.n_epochs": 1}``. Airflow replaces a
nested conf value as a whole instead of merging it with the params' defaults, and shows nested objects as a
JSON editor; one level avoids both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from post_training.errors import InvalidRequestError

if TYPE_CHECKING:
    from post_training.schemas.requests import AnyTrainingRequest

REQUIRED_GROUPS = frozenset({"training_config.data_config"})
"""Groups that the schema lets be absent and every training request must have."""

DEPLOYMENTS = "default"
"""Chosen type of a group of ``runtime`` that is unset: the deployment's default is taken. Null is none."""


@dataclass(frozen=True)
class Leaf:
    """One field of a request that holds no further fields.

    :param path: dotted path from the request's root.
    :param schema: its JSON schema, without ``$ref``; ``type`` is a list where null is allowed.
    :param tags: types of its group that it belongs to; empty in a group that has no ``type``.
    :param chosen_by: path of the leaf that holds the group's type.
    :param optional: whether a group that it lies in may be absent, so that null may stand for the leaf.
    """

    path: str
    schema: dict[str, Any] = field(hash=False)
    required: bool
    tags: tuple[str, ...] = ()
    chosen_by: str = ""
    optional: bool = False

    @property
    def keeps_null(self) -> bool:
        """Whether null is a value of its own; elsewhere it says that the field is absent."""
        unsets = self.path.startswith("runtime.") and not self.tags
        return "null" in self.schema.get("type", ()) and not unsets

    @property
    def chooses(self) -> bool:
        """Whether it is the type of its group."""
        return self.path == self.chosen_by

    @property
    def may_be_the_deployments(self) -> bool:
        """Whether its group, unset, takes the deployment's default."""
        return self.chooses and self.path.startswith("runtime.")


@cache
def leaves(model: type[BaseModel]) -> Mapping[str, Leaf]:
    """Return every leaf of a request class by its path, in the schema's order, without ``job_uuid``."""
    found: dict[str, Leaf] = {}
    _walk(model, Leaf("", {}, True), found)
    found.pop("job_uuid", None)
    return MappingProxyType(found)


def _walk(model: type[BaseModel], group: Leaf, found: dict[str, Leaf]) -> None:
    document = model.model_json_schema()
    for name, info in model.model_fields.items():
        path = f"{group.path}.{name}".lstrip(".")
        variants = _models_in(info)
        for variant in variants:
            may_be_absent = type(None) in get_args(info.annotation) and path not in REQUIRED_GROUPS
            optional = group.optional or may_be_absent
            kind = variant.model_fields.get("type")
            tags, chosen_by = ((kind.default,), f"{path}.type") if kind else (group.tags, group.chosen_by)
            _walk(variant, Leaf(path, {}, True, tags, chosen_by, optional), found)
        if not variants:
            schema = _resolved(document["properties"][name], document.get("$defs", {}))
            leaf = Leaf(path, schema, info.is_required(), group.tags, group.chosen_by, group.optional)
            found[path] = _with_twin(leaf, found.get(path))


def _with_twin(leaf: Leaf, twin: Leaf | None) -> Leaf:
    """Let the types of a union share one leaf, and offer the deployment's default where there may be one."""
    schema, tags = leaf.schema, leaf.tags
    if twin is not None:
        schema = {**schema, "enum": [*twin.schema["enum"], *schema["enum"]]}
        tags = (*twin.tags, *tags)
    if leaf.may_be_the_deployments:
        text = f"{schema['description']} {DEPLOYMENTS!r} takes the deployment's."
        schema = {**schema, "enum": [*schema["enum"], DEPLOYMENTS], "description": text}
    return replace(leaf, schema=schema, tags=tags)


def _models_in(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the model classes of ``X``, ``X | None``, or a tagged union of models; a list is a leaf."""
    pending, models = [info.annotation], []
    while pending:
        annotation = pending.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            models.append(annotation)
        elif not isinstance(annotation, type) and get_origin(annotation) not in (list, dict):
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
    said = request.runtime.model_fields_set if request.runtime is not None else set()
    body["runtime"] = {name: value for name, value in (body["runtime"] or {}).items() if name in said}
    return flatten_body(type(request), body)


def flatten_body(model: type[BaseModel], body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested body, which may break rules, with every leaf present; what has no leaf is left out."""
    return {path: _flat_value(body, leaf) for path, leaf in leaves(model).items()}


def _flat_value(body: Mapping[str, Any], leaf: Leaf) -> Any:
    *groups, _ = keys = leaf.path.split(".")
    if leaf.may_be_the_deployments and groups[-1] not in (at(body, groups[:-1]) or {}):
        return DEPLOYMENTS
    return at(body, keys)


def stated(request: AnyTrainingRequest) -> dict[str, Any]:
    """Return the leaves that say something: neither null nor left to the deployment."""
    known = leaves(type(request))
    return {
        path: value
        for path, value in flatten(request).items()
        if value is not None and not (known[path].may_be_the_deployments and value == DEPLOYMENTS)
    }


def at(body: Any, keys: list[str]) -> Any:
    """Return what a nested body has at a path, None where a part of it is absent."""
    for key in keys:
        if not isinstance(body, dict):
            return None
        body = body.get(key)
    return body


def unflatten(
    model: type[BaseModel], flat: dict[str, Any], *, form_defaults: dict[str, Any]
) -> dict[str, Any]:
    """Return the nested body of a flat one.

    A field of another type than the chosen one of its group is left out when it still holds the form's
    default, and refused when it was changed. A group whose leaves are all null is null itself.

    :param form_defaults: what the form shows before anything is typed, by dotted path.
    :raises InvalidRequestError: on an unknown key or a field of another type.
    """
    known = leaves(model)
    unknown = sorted(set(flat) - set(known))
    if unknown:
        raise InvalidRequestError.of(unknown[0], "unknown parameter", "extra_forbidden")
    body: dict[str, Any] = {}
    for path, leaf in known.items():
        value, chosen = flat.get(path), flat.get(leaf.chosen_by)
        if leaf.tags and chosen not in leaf.tags:
            _refuse_unless_untouched(leaf, value, chosen, form_defaults.get(path))
        elif value is not None or leaf.keeps_null:
            _put(body, path, value)
        if leaf.may_be_the_deployments and path in flat and value is None:
            _put(body, path.rpartition(".")[0], None)
    return _without_empty_groups(body, model)


def _refuse_unless_untouched(leaf: Leaf, value: Any, chosen: Any, form_default: Any) -> None:
    untouched = [None, form_default, *([DEPLOYMENTS] if leaf.may_be_the_deployments else [])]
    if value in untouched:
        return
    types = " or ".join(leaf.tags)
    if leaf.chooses:
        raise InvalidRequestError.of(leaf.path, f"must be {types}, got {value!r}")
    given = "null" if chosen is None else chosen
    raise InvalidRequestError.of(leaf.path, f"belongs to {types}, but {leaf.chosen_by} is {given}")


def _put(body: dict[str, Any], path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        body = body.setdefault(group, {})
    body[name] = value


def _without_empty_groups(body: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    pruned: dict[str, Any] = {}
    for name, value in body.items():
        variants = _models_in(model.model_fields[name]) if name in model.model_fields else []
        if isinstance(value, dict) and variants:
            value = _without_empty_groups(value, variants[0]) if len(variants) == 1 else value
            # In runtime, null is put only where it is said.
            optional = type(None) in get_args(model.model_fields[name].annotation) and name != "runtime"
            if optional and all(item is None for item in value.values()):
                value = None
        pruned[name] = value
    return pruned
