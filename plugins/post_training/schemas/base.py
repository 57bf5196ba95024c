"""The two kinds of model: strict for what comes in, lenient for what goes out."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_COUNT = 2**31 - 1

Count = Annotated[int, Field(le=MAX_COUNT)]
"""A number of things; larger ones fit neither databases nor messages."""

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""NUL in JSON text; behind an even number of backslashes the same characters are a text about it."""


class StrictModel(BaseModel):
    """What a caller sends: unknown fields and wrong types are errors, not guesses.

    Templated operator arguments arrive as strings; they are read with
    ``model_validate(..., strict=False)``, which still refuses what does not parse.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class LenientModel(BaseModel):
    """What the service answers: readers ignore fields that they do not know."""

    model_config = ConfigDict(extra="ignore")


def load_json(text: str | bytes) -> Any:
    """Read JSON as RFC 8259 has it: UTF-8, no NaN, no Infinity, and no name twice in one object.

    Of a name that stands twice only the last value would count.

    :raises ValueError: saying what is wrong.
    """
    try:
        return json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"an object has the name {twice[:80]!r} twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def parse_json_object(value: Any) -> Any:
    """Read a JSON string as the object that it holds; pass everything else through.

    The published client's command-line tool sends ``algorithm_config`` and
    ``training_config`` as JSON strings.

    :raises PydanticCustomError: if the string is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        parsed = load_json(value)
    except ValueError as error:
        raise PydanticCustomError(
            "json_invalid", "must be an object or a JSON string of one: {reason}", {"reason": str(error)}
        ) from None
    return check_text(parsed)


def check_text(value: Any) -> Any:
    """Refuse half characters and NUL, which JSON can write and neither a database nor a file can hold.

    :raises PydanticCustomError: if there is one.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
        if _NUL.search(text):
            raise ValueError("it holds the character NUL")
    except (UnicodeEncodeError, RecursionError, ValueError) as error:
        raise PydanticCustomError(
            "string_unicode", "must be text in valid Unicode: {reason}", {"reason": str(error.args[-1])}
        ) from None
    return value
