"""Whom a client of HTTP trusts."""

from __future__ import annotations

from functools import cache
from ssl import SSLContext

import httpx


@cache
def certificates() -> SSLContext:
    """Return httpx's own choice of certificates, read once.

    Each client, and each call without one, would read all of them again: 50 ms of a core, plain HTTP or not,
    for those that ask every second.
    """
    return httpx.create_ssl_context()
