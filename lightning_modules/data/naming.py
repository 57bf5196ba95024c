"""How the record names data sets: by what tells them apart, without secrets or the data itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, parse_qs, urlsplit

from lightning_modules.data.sources import shown


def public_name(name: str) -> str:
    """Return a data set's name; of a URI without a password, and without the data."""
    if name.startswith("data:") or ":/" in name:
        return address(describe_source(name)[1])
    return name


def address(source: Mapping[str, str]) -> str:
    """Return the field that says where a described source is."""
    return next(iter(source.values()))


def describe_source(source: str) -> tuple[str, dict[str, str]]:
    """Reduce a path or URI to MLflow's source type and fields, without secrets or inline data.

    Types and fields are those of ``mlflow.data``, so that MLflow's page shows and links them; it has
    none for its own artifacts (``runs:``, ``models:``, ``mlflow-artifacts:``), which keep their scheme.
    """
    parts = urlsplit(source)
    return SOURCES.get(parts.scheme, _described_by_uri)(parts)


def _described_as_local(parts: SplitResult) -> tuple[str, dict[str, str]]:
    return "local", {"uri": parts.path if parts.scheme else parts.geturl()}


def _described_inline(parts: SplitResult) -> tuple[str, dict[str, str]]:
    return "data", {"uri": f"data:{parts.path.partition(',')[0]},..."}


def _described_by_url(parts: SplitResult) -> tuple[str, dict[str, str]]:
    return "http", {"url": shown(parts.geturl())}


def _described_by_uri(parts: SplitResult) -> tuple[str, dict[str, str]]:
    return parts.scheme, {"uri": shown(parts.geturl())}


def _described_on_hub(parts: SplitResult) -> tuple[str, dict[str, str]]:
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    shown = {HUB_FIELDS[key]: value for key, value in query.items() if key in HUB_FIELDS}
    return "hugging_face", {"path": parts.path.strip("/"), **shown}


HUB_FIELDS = {"name": "config_name", "split": "split", "revision": "revision"}
"""What a ``huggingface:`` URI may say of a data set -> MLflow's field."""

SOURCES: Mapping[str, Callable[[SplitResult], tuple[str, dict[str, str]]]] = {
    "": _described_as_local,
    "file": _described_as_local,
    "data": _described_inline,
    "http": _described_by_url,
    "https": _described_by_url,
    "huggingface": _described_on_hub,
}
"""Description of each scheme; others are described by their URI."""
