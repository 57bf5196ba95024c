"""Classes by which a module of another library computes the same in another way."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache  # one class for all layers: torch.compile then compiles them once
def derived(fast: type, own: type, **values: Any) -> Any:
    """Return a subclass of a module's own class with another one's methods, under the own name.

    :param fast: whose methods come first.
    :param values: of the class variables that ``fast`` reads; hashable.
    """
    return type(own.__name__, (fast, own), {"__module__": fast.__module__, **values})
