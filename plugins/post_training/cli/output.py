"""How the command line prints: data to standard output, for people or as JSON; the rest to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from post_training.schemas.jobs import Checkpoint

PIPE_WIDTH = 10_000
"""Columns where no terminal says how many it has: nothing is cut or broken."""


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=2), flush=True)


def print_json_line(value: Any) -> None:
    """Print one JSON value on one line, of a stream of them."""
    print(json.dumps(value), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; of None nothing is shown."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # what is cut off cannot be copied
    for row in rows:
        table.add_row(*map(plain, row))
    console().print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print names with their values, those that are None left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value is not None:
            table.add_row(Text(name, style="bold"), plain(value))
    console().print(table)


def print_checkpoints(checkpoints: Sequence[Checkpoint]) -> None:
    """Print checkpoints with their metrics."""
    rows = []
    for checkpoint in checkpoints:
        metrics = checkpoint.training_metrics
        losses = (metrics.train_loss, metrics.validation_loss, metrics.perplexity) if metrics else (None,) * 3
        rows.append((checkpoint.epoch, *map(rounded, losses), when(checkpoint.created_at), checkpoint.path))
    print_table(("epoch", "train loss", "validation loss", "perplexity", "made", "path"), rows)


def console(*, stderr: bool = False) -> Console:
    """Return rich's console of a stream."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def plain(value: object) -> Text:
    """Return a value as text of which nothing is read as markup; nothing for None."""
    return Text("" if value is None else str(value))


def rounded(value: float | None) -> str | None:
    """Return a metric with the digits that mean something."""
    return None if value is None else f"{value:.4g}"


def when(time: datetime | None) -> str | None:
    """Return a time as the machine's clock shows it."""
    return None if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def size(count: float) -> str:
    """Return bytes in GiB."""
    return f"{count / 2**30:.1f} GiB"
