"""Refuses what a query says and no one would read."""

from __future__ import annotations

from collections import Counter

from fastapi import Request
from fastapi.dependencies.utils import get_flat_dependant

from post_training.errors import ErrorDetail, InvalidRequestError


async def check_query(request: Request) -> None:
    """Dependency of every route.

    :raises InvalidRequestError: if the query holds a name that the route does not know, or one twice.
    """
    fields = get_flat_dependant(request.scope["route"].dependant, skip_repeats=True).query_params
    known = {field.alias for field in fields}
    given = Counter(name for name, _ in request.query_params.multi_items())
    problems: list[ErrorDetail] = [
        {"loc": ["query", name[:80]], "msg": "is not known here", "type": "extra_forbidden"}
        if name not in known
        else {"loc": ["query", name], "msg": f"must be given once, got {count} values", "type": "value_error"}
        for name, count in given.items()
        if name not in known or count > 1
    ]
    if problems:
        raise InvalidRequestError(problems)
