"""Which URIs a request may hold, by their form alone: no file, host or bucket is asked.

Every check takes the field and the URI. It returns what the trainer reads, or raises InvalidRequestError with
the field, the rule and the URI without what may be a secret. Credentials are the worker's: a URI holds none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from post_training.errors import InvalidRequestError

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_QUERY = ("split", "name")
MAX_URI_LENGTH = 4096
"""Characters of a URI that holds no data; signed ones have some hundreds."""

_BUCKET = r"[A-Za-z0-9][\w.-]*"
_CONTAINER = rf"{_BUCKET}(@[a-z0-9]+\.(blob|dfs)\.core\.windows\.net)?"
OBJECT_STORES: Mapping[str, re.Pattern[str]] = {
    scheme: re.compile(bucket, re.ASCII)
    for scheme, bucket in {
        **dict.fromkeys(("gcs", "gs", "oss", "s3"), _BUCKET),
        **dict.fromkeys(("abfs", "abfss", "az"), _CONTAINER),
        "oci": rf"{_BUCKET}(@{_BUCKET})?",  # BUCKET@NAMESPACE
    }.items()
}
"""Schemes of fsspec whose host is a bucket, and the form of its name: their servers are the cloud's, or those
that the worker's environment names. Other schemes let a request choose the server (http, ftp, ssh), read the
worker itself (local, memory) or chain URLs (simplecache)."""

_LIKE_A_URI = re.compile(
    r"(?P<head>\s*(?:(?P<scheme>[a-z][a-z0-9+.-]*):(?=/|\S*\s*$)|(?=//))/*)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
"""What has a scheme, and blanks only behind a slash: a sentence with a colon is none."""

_USER = re.compile(r"[^/?#]*@|(?!\[)[^/?#:@]*:(?!\d*(?:[/?#]|$)).*@", re.DOTALL)
"""A user in front of a host; one whose password holds '/', '?' or '#' looks like a host with a wrong port."""

_MODEL_ID = r"m-[0-9a-f]{32}"
_MODEL_NAME = r"[^/@?#:]+"
_REGISTERED = rf"{_MODEL_NAME}(/[1-9]\d*|@[\w-]+)"
MLFLOW_FORMS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "models": (
        re.compile(rf"models:/({_MODEL_ID}|{_REGISTERED})(/[^/]+)*", re.ASCII),
        "models:/MODEL_ID, models:/NAME/VERSION or models:/NAME@ALIAS, a path behind it",
    ),
    "runs": (re.compile(r"runs:/[A-Za-z0-9][\w-]*(/[^/]+)+", re.ASCII), "runs:/RUN_ID/PATH"),
    "mlflow-artifacts": (re.compile(r"mlflow-artifacts:(/[^/]+)+"), "mlflow-artifacts:/PATH"),
}
"""What MLflow holds, on the job's own tracking server: a host in the URI would be another one."""


def check_by_scheme(
    schemes: Mapping[str, Callable[[str, str], str]], scheme: str, field: str, uri: str
) -> str:
    """Check a URI as its scheme demands; schemes are the same in capitals, which not every reader knows."""
    check = schemes.get(scheme.lower())
    if check is None:
        known = ", ".join(sorted(schemes))
        raise InvalidRequestError.of(field, f"scheme must be one of {known}, got {scheme!r}")
    return check(field, scheme.lower() + uri.removeprefix(scheme))


def split(field: str, uri: str, *, query: bool = False, at: bool = False) -> SplitResult:
    """Split a URI, or refuse what would be shown, or read as something else than what is checked here.

    :param query: whether it may have a query.
    :param at: whether an ``@`` in its host is part of a bucket's name.
    """
    if len(uri) > MAX_URI_LENGTH:
        raise InvalidRequestError.of(field, f"a URI may have {MAX_URI_LENGTH} characters, got {len(uri)}")
    parts = urlsplit(uri)
    rules = {
        "a user or password: the record shows it": "@" in parts.netloc and not at,
        "a query or fragment": "#" in uri or ("?" in uri and not query),
        "characters that cannot be seen": not uri.isprintable(),
        "'::', which chains URIs": "::" in uri,
        "'..'": ".." in _decoded(parts.path).split("/"),
    }
    for rule, broken in rules.items():
        if broken:
            raise InvalidRequestError.of(field, f"must not hold {rule}, got {shown(uri)!r}")
    return parts


def _decoded(path: str) -> str:
    """Undo percent-encoding, however often it was done: a server behind a proxy decodes twice."""
    while (plain := unquote(path)) != path:
        path = plain
    return path


def shown(name: str) -> str:
    """Return the start of a name, a malformed one too, without what may be a secret."""
    return without_secrets(name)[:200]


def without_secrets(name: str) -> str:
    """Cut the user, the query and the fragment of a URI, a malformed one too; what looks like none stays.

    The query with which a hub data set names its split stays, and the bucket where others have a user.
    """
    if (uri := _LIKE_A_URI.fullmatch(name)) is None:
        return name
    head, scheme, rest = uri["head"], (uri["scheme"] or "").lower(), uri["rest"]
    if not _has_no_user(scheme, head, rest) and (user := _USER.match(rest)):
        rest = rest[user.end() :]
    query = rest.partition("?")[2]
    keys = {key for key, _ in parse_qsl(query, keep_blank_values=True)}
    if scheme == "huggingface" and "#" not in rest and keys <= set(HUB_QUERY):
        return head + rest
    return head + re.sub(r"[?#].*", "", rest, flags=re.DOTALL)


def _has_no_user(scheme: str, head: str, rest: str) -> bool:
    """Whether what stands in front of an ``@`` belongs to a path or to a bucket's name."""
    is_path = scheme in ("file", *MLFLOW_FORMS) and head.count("/") != 2
    bucket = OBJECT_STORES.get(scheme)
    return is_path or (bucket is not None and bucket.fullmatch(re.split("[/?#]", rest)[0]) is not None)


def check_suffix(field: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Refuse a file whose name does not say what kind it is."""
    name = PurePosixPath(path)
    if name.suffix not in suffixes:
        raise InvalidRequestError.of(field, f"must end in {', '.join(suffixes)}, got {name.name[:200]!r}")


def path_of_file_uri(field: str, uri: str) -> str:
    """Return the path of a ``file:`` URI; where it may lie is another check's."""
    parts = split(field, uri)
    if parts.netloc not in ("", "localhost"):
        raise InvalidRequestError.of(field, f"a file URI must name this host, got {parts.netloc!r}")
    return unquote(parts.path)


def hub_dataset(field: str, uri: str) -> str:
    """Check ``huggingface://datasets/ORG/NAME``, a split and a configuration's name in its query."""
    parts = split(field, uri, query=True)
    name = parts.path.removeprefix("/")
    if parts.netloc != "datasets" or not HUB_ID.fullmatch(name) or "/" not in name:
        raise InvalidRequestError.of(
            field, f"must have the form huggingface://datasets/ORG/NAME?split=train, got {shown(uri)!r}"
        )
    query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
    keys = [key for key, value in query if value]
    for key, _ in query:
        if key not in HUB_QUERY or keys.count(key) != 1:
            raise InvalidRequestError.of(
                field, f"its query may give {' and '.join(HUB_QUERY)} once each, got {key[:50]!r}"
            )
    return uri


def hub_model(field: str, uri: str) -> str:
    """Return the hub id of ``huggingface://ORG/NAME``."""
    parts = split(field, uri)
    name = parts.netloc + parts.path
    if not HUB_ID.fullmatch(name) or parts.netloc in ("datasets", "spaces"):
        raise InvalidRequestError.of(field, f"must have the form huggingface://ORG/NAME, got {shown(uri)!r}")
    return name


def stored_object(field: str, uri: str) -> str:
    """Check the URI of a data set in an object store."""
    scheme, netloc = urlsplit(uri)[:2]
    is_bucket = OBJECT_STORES[scheme].fullmatch(netloc) is not None
    parts = split(field, uri, at=is_bucket)
    if not is_bucket or parts.path in ("", "/"):
        raise InvalidRequestError.of(field, f"must have the form {scheme}://BUCKET/KEY, got {shown(uri)!r}")
    check_suffix(field, parts.path, DATA_SUFFIXES)
    return uri


def mlflow_uri(field: str, uri: str, suffixes: tuple[str, ...] = ()) -> str:
    """Check the URI of something in MLflow.

    :param suffixes: of which it must have one; empty is a model, which may be a folder.
    """
    parts = split(field, uri)
    pattern, form = MLFLOW_FORMS[parts.scheme]
    if not pattern.fullmatch(uri):
        raise InvalidRequestError.of(field, f"must have the form {form}, got {shown(uri)!r}")
    if suffixes:
        check_suffix(field, parts.path, suffixes)
    return uri
