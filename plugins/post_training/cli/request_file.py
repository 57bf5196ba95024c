"""Requests in YAML files, as the HTTP API takes them in JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from post_training.errors import InvalidRequestError
from post_training.schemas.rlhf import is_long_form

DEFAULTS: Mapping[str, Any] = {"hyperparam_search_config": {}, "logger_config": {}}
"""What the published schema requires and a file may leave out: no search, no wishes of the record."""


class _CoreLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2's core schema: ``1e-4`` is a number, and ``no`` and ``2026-01-31`` are text.

    A field that stands twice is an error; its last value alone would count.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own table, not its defaults

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        """Return the mapping.

        :raises yaml.constructor.ConstructorError: if a field stands twice, or its name is no text.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                self._refuse(key, f"a field's name must be text, got {name!r}")
            if name in seen:
                self._refuse(key, f"the field {name!r} stands twice")
            seen.add(name)
        return dict(super().construct_mapping(node, deep))

    def _refuse(self, node: Any, problem: str) -> None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_NUMBERS = list("-+0123456789")
for _tag, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", _NUMBERS),
    (
        "float",
        r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
        list("-+0123456789."),
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_form})$"), _first)


def read_body(file: Path, *, job_uuid: str | None, default_job_uuid: str) -> dict[str, Any]:
    """Return the request that a file holds, as JSON values.

    :param job_uuid: replaces the file's.
    :param default_job_uuid: where neither names one.
    :raises InvalidRequestError: naming the file, and the line if there is one.
    """
    body = {**DEFAULTS, **_load(file)}
    if job_uuid is not None:
        body["job_uuid"] = job_uuid
    body.setdefault("job_uuid", default_job_uuid)
    return body


def method_of(body: Mapping[str, Any]) -> str:
    """Return the training method that a request is for, told by its fields."""
    preference = is_long_form(body) or ("finetuned_model" in body and "model" not in body)
    return "preference_optimize" if preference else "supervised_fine_tune"


def _load(file: Path) -> dict[str, Any]:
    try:
        value = yaml.load(file.read_bytes(), _CoreLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise _broken(str(file), f"cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise _broken(place, f"cannot be read as YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise _broken(str(file), f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise _broken(str(file), f"must hold an object, got {type(value).__name__}")
    try:
        return dict(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:  # tags of YAML's own, and what holds itself
        raise _broken(str(file), f"holds what JSON cannot say: {error}") from None


def _broken(place: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError([{"loc": [place], "msg": problem, "type": "yaml_invalid"}])
