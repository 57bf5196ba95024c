"""``make docs``: writes the tables in the docs of what the code says: fields, routes, settings, operators.

A table stands in a file between ``<!-- table: NAME -->`` and ``<!-- end -->``. A test holds them to the code.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from docs import sizing
from post_training.api.app import create_app, description
from post_training.get_provider_info import OPTIONS
from post_training.jobs import JobService
from post_training.operators.evaluation import EvaluateOperator
from post_training.operators.hooks import MLflowHook, PostTrainingHook
from post_training.operators.jobs import (
    CancelTrainingJobOperator,
    GetTrainingJobArtifactsOperator,
    GetTrainingJobsOperator,
    GetTrainingJobStatusOperator,
    ReconcileTrainingJobsOperator,
)
from post_training.operators.promotion import (
    ApprovePromotionOperator,
    GateOperator,
    PromoteOperator,
    RollbackOperator,
)
from post_training.operators.retraining import ConcludeRetrainingOperator, PrepareRetrainingOperator
from post_training.operators.search import PlanSearchOperator, SearchTrialsOperator, search_before
from post_training.operators.sensors import PostTrainingJobSensor
from post_training.operators.training import PreferenceOptimizeOperator, SupervisedFineTuneOperator
from post_training.schemas import (
    algorithms,
    datasets,
    evaluation,
    gates,
    jobs,
    requests,
    retraining,
    rlhf,
    search,
    training,
)

HERE = Path(__file__).parent
TABLE = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

MODULES = (algorithms, datasets, evaluation, gates, jobs, requests, retraining, rlhf, search, training)
MODELS: Mapping[str, type[BaseModel]] = {
    name: found
    for module in MODULES
    for name, found in vars(module).items()
    if inspect.isclass(found) and issubclass(found, BaseModel)
}
"""Everything that a caller may send or gets, by its name."""

OPERATORS: tuple[Callable[..., Any], ...] = (
    SupervisedFineTuneOperator,
    PreferenceOptimizeOperator,
    search_before,
    GetTrainingJobsOperator,
    GetTrainingJobStatusOperator,
    GetTrainingJobArtifactsOperator,
    CancelTrainingJobOperator,
    ReconcileTrainingJobsOperator,
    PostTrainingJobSensor,
    EvaluateOperator,
    GateOperator,
    PromoteOperator,
    RollbackOperator,
)
"""What the table of operators lists, each with an example: what users put into DAGs of their own."""

OTHER_OPERATORS = (
    PlanSearchOperator,
    SearchTrialsOperator,
    PrepareRetrainingOperator,
    ApprovePromotionOperator,
    ConcludeRetrainingOperator,
)
"""What ``search_before`` and the shipped DAGs are made of."""

SIGNS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "maxLength": "at most {} characters",
    "maxProperties": "at most {} of them",
}
NAMES = {
    "date-time": "time",
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "null": "null",
}
LARGEST_COUNT = 2**31 - 1


def main() -> None:
    """Write every table of every file."""
    for file in sorted(HERE.glob("*.md")):
        file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")


def written(text: str) -> str:
    """Return a document with its tables as the code has them today.

    :raises KeyError: if it names a table that there is not.
    """
    return TABLE.sub(lambda found: f"{found[1]}{table(found['name'])}{found[3]}", text)


def table(name: str) -> str:
    """Return the table of this name, each line with its end.

    :raises KeyError: if there is none.
    """
    kind, _, rest = name.partition(":")
    made: Mapping[str, Callable[[str], Iterator[str]]] = {
        "fields": fields,
        "settings": settings,
        "routes": routes,
        "operators": operators,
        "parameters": parameters,
        "memory": memory,
    }
    return "".join(f"{line}\n" for line in made[kind](rest))


def row(*cells: str) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def head(*titles: str) -> Iterator[str]:
    """Yield the first two lines of a table."""
    yield row(*titles)
    yield f"|{'---|' * len(titles)}"


def fields(model: str) -> Iterator[str]:
    """Yield the table of a model's fields."""
    document = MODELS[model].model_json_schema()
    yield from head("field", "value", "default", "meaning")
    required = document.get("required", ())
    for name, schema in document["properties"].items():
        field = MODELS[model].model_fields[name]
        default = (
            "required"
            if name in required
            else shown(schema.get("default", field.get_default(call_default_factory=True)))
        )
        yield row(f"`{name}`", value_of(schema), default, field.description or "")


def shown(value: Any) -> str:
    """Return a default as JSON has it."""
    if isinstance(value, str):
        return f"`{value}`"
    return "`{}`" if isinstance(value, BaseModel) else json.dumps(value)


def value_of(schema: Mapping[str, Any]) -> str:
    """Say which values a JSON schema allows."""
    if "$ref" in schema:
        return reference(schema["$ref"].rpartition("/")[2])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(
                dict.fromkeys(value_of(part) for part in schema[union] if not is_json(part, schema))
            )
    if "enum" in schema or "const" in schema:
        return ", ".join(shown(value) for value in schema.get("enum", [schema.get("const")]))
    return plain_value(schema)


def is_json(part: Mapping[str, Any], union: Mapping[str, Any]) -> bool:
    """Whether a part of a union is only an object's JSON as text, which every group of fields may be."""
    others = [other for parts in ("anyOf", "oneOf") for other in union.get(parts, ())]
    return part == {"type": "string"} and any("$ref" in other or "oneOf" in other for other in others)


def plain_value(schema: Mapping[str, Any]) -> str:
    """Say which values a schema without parts allows."""
    kind = schema.get("format", schema.get("type"))
    if isinstance(kind, list) and "object" in kind:
        return "object"
    if kind == "array":
        text = f"list of {value_of(schema['items'])}"
    elif kind == "object":
        inner = schema.get("additionalProperties")
        text = f"object of {value_of(inner)}" if isinstance(inner, dict) else "object"
    else:
        text = NAMES.get(str(kind), "any value")
    if kind == "array" and schema.get("minItems") == 1:
        schema = {key: limit for key, limit in schema.items() if key != "minItems"}
        text = f"non-empty {text}"
    limits = [sign.format(f"{schema[key]:,}") for key, sign in SIGNS.items() if key in schema]
    return ", ".join([text, *(limit for limit in limits if limit != f"≤ {LARGEST_COUNT:,}")])


def reference(name: str) -> str:
    """Return a link to a model's table, or the values of an enumeration."""
    if name == "JsonValue":
        return "any value"
    if name in MODELS:
        return f"[{name}]({PLACES.get(name, '')}#{name.lower()})"
    values = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    return ", ".join(f"`{member.value}`" for member in values)


PLACES = {
    "SearchConfig": "search.md",
    "EvaluationConfig": "operators.md",
    "AnswerCheck": "operators.md",
}
"""Model -> file of its table, of those that are named in other files too."""


def settings(_: str) -> Iterator[str]:
    """Yield the table of Airflow's section ``[post_training]``."""
    yield from head("setting", "default", "meaning")
    for name, (_type, default, meaning) in OPTIONS.items():
        yield row(f"`{name}`", f"`{default}`" if default else "empty", meaning)


def routes(_: str) -> Iterator[str]:
    """Yield the table of the HTTP API's routes; paths that differ in their version alone are one."""
    service, nobody = JobService.__new__(JobService), cast(Any, None)  # what is described is never called
    app = create_app(service, nobody, nobody, nobody, lambda: None, max_body_bytes=1)
    yield from head("route", "does", "errors")
    seen: dict[str, tuple[str, str]] = {}
    for path, item in description(app)["paths"].items():
        _, version, rest = path.split("/", 2)
        for method, operation in item.items():
            does = operation.get("description") or operation["summary"]
            errors = ", ".join(code for code in operation["responses"] if code >= "400")
            known = seen.setdefault(f"{method.upper()} …/{rest}", (does.partition("\n")[0], errors))
            assert known[1] == errors, f"{version} answers otherwise"  # noqa: S101
    for route, cells in seen.items():
        yield row(f"`{route}`", *cells)


def operators(_: str) -> Iterator[str]:
    """Yield the table of the operators that users put into DAGs of their own, with their examples."""
    yield from head("operator", "does", "example")
    for operator in OPERATORS:
        file = example_of(operator)
        does = first_sentence(operator).removesuffix(".")
        yield row(
            f"[`{operator.__name__}`](#{operator.__name__.lower()})", does, f"[{file}](examples/{file})"
        )


def example_of(operator: Callable[..., Any]) -> str:
    """Return the name of an operator's example below ``examples``."""
    name = operator.__name__.removesuffix("Operator")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() + ".py"


def first_sentence(documented: Any) -> str:
    """Return the first paragraph of a docstring, in one line, as Markdown."""
    return as_markdown((inspect.getdoc(documented) or "").partition("\n\n")[0])


def as_markdown(text: str) -> str:
    """Return text of a docstring in one line, code between single backticks."""
    return " ".join(text.replace("``", "`").split())


def parameters(name: str) -> Iterator[str]:
    """Yield the table of an operator's, a sensor's or a hook's parameters, besides Airflow's own."""
    known = (*OPERATORS, *OTHER_OPERATORS, MLflowHook, PostTrainingHook)
    operator = next(one for one in known if one.__name__ == name)
    yield from head("parameter", "default", "meaning")
    templated = getattr(operator, "template_fields", ())
    meanings = documented_parameters(operator)
    for parameter in own_parameters(operator):
        default = "required" if parameter.default is parameter.empty else shown_in_python(parameter.default)
        mark = " (templated)" if parameter.name in templated else ""
        yield row(f"`{parameter.name}`{mark}", default, meanings[parameter.name])


def memory(_: str) -> Iterator[str]:
    """Yield the table of what trainings need of a GPU, as jobs estimate it."""
    lengths = [f"{length:,} tokens" for length in sizing.LENGTHS]
    yield from head("model", "method", *lengths, f"{lengths[-1]}, checkpointing")
    for cells in sizing.rows():
        yield row(*cells)


def shown_in_python(value: Any) -> str:
    """Return a default as Python has it."""
    return f"`{value!r}`"


def own_parameters(operator: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the named parameters of all constructors that are ours, those of subclasses first."""
    classes = operator.__mro__ if inspect.isclass(operator) else (operator,)
    found: dict[str, inspect.Parameter] = {}
    for one in classes:
        if not one.__module__.startswith("post_training") or (
            inspect.isclass(one) and "__init__" not in vars(one)
        ):
            continue
        for name, parameter in inspect.signature(one).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD and name != "transport":  # of tests
                found.setdefault(name, parameter)
    return list(found.values())


def documented_parameters(operator: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstrings of an operator and of the classes that it comes from say of parameters."""
    classes: Sequence[Any] = operator.__mro__ if inspect.isclass(operator) else (operator,)
    meanings: dict[str, str] = {}
    for one in classes:
        text = inspect.cleandoc(one.__doc__ or "")
        for found in re.finditer(r"^:param (\w+): (.+?)(?=^:|^\S|\Z)", text, re.DOTALL | re.MULTILINE):
            meanings.setdefault(found[1], as_markdown(found[2]))
    return meanings


if __name__ == "__main__":
    main()
