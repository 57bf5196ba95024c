"""Where on this machine a place may lie that MLflow names, or somebody who writes to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit


def may_be_used(location: str, roots: Sequence[Path]) -> bool:
    """Whether a place that MLflow named may be read or written: on this machine's disks, only under a root.

    Whoever writes to MLflow chooses the place; what is read and written here is the deployment's choice.
    """
    parts = urlsplit(location)
    return parts.scheme not in ("", "file") or lies_under(unquote(parts.path), roots)


def lies_under(path: str | Path, roots: Sequence[Path]) -> bool:
    """Whether a path, symbolic links followed, lies under one of the folders."""
    resolved = Path(path).resolve()
    return any(resolved.is_relative_to(root.resolve()) for root in roots)
