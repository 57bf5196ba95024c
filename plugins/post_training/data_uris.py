"""The content of ``data:`` URIs (RFC 2397) that hold a data set."""

from __future__ import annotations

import base64
from urllib.parse import unquote_to_bytes

MEDIA_TYPES = {
    "text/csv": "csv",
    "csv": "csv",
    "application/json": "json",
    "application/vnd.apache.parquet": "parquet",
}
"""Kind of file by media type; any other one is jsonl."""


def parse_data_uri(uri: str) -> tuple[str, bytes]:
    """Return the kind of file and its bytes.

    :raises ValueError: if there is no comma, or what follows is not the base64 that it says it is.
    """
    header, comma, body = uri.partition(",")
    if not comma:
        raise ValueError("the data: URI has no comma between its media type and its content")
    media, *parameters = header.partition(":")[2].lower().split(";")
    content = unquote_to_bytes(body)
    if "base64" in parameters:
        content = base64.b64decode(content, validate=True)
    return MEDIA_TYPES.get(media.strip(), "jsonl"), content
