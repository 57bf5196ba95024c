"""Shows a trainer's output while it runs: a live line of progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

LINE = re.compile(
    r"progress step (?P<step>\d+)/(?P<total>\d+) epoch (?P<epoch>\d+) loss (?P<loss>\S+)"
    r" tokens/s (?P<speed>\d+)(?: time left (?P<left>.+))?"
)
"""A trainer's line of progress, as ``lightning_modules.callbacks`` writes it."""


@contextmanager
def shown(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield what shows one line of output."""
    if not console.is_terminal:
        yield lambda line: console.print(line, markup=False, soft_wrap=True)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[steps]}  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TextColumn("{task.fields[left]} left"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("preparing", total=None, steps="-", loss="-", speed="-", left="-")

        def show(line: str) -> None:
            if (found := LINE.fullmatch(line)) is None:
                console.print(escape(line), soft_wrap=True)
                return
            progress.update(
                bar,
                description="training",
                completed=int(found["step"]),
                total=int(found["total"]),
                steps=f"{found['step']}/{found['total']}",
                loss=found["loss"],
                speed=found["speed"],
                left=found["left"] or "-",
            )

        yield show
