"""The figures of a speed run as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS, HEAD = 106_168_320, 28_311_552
"""Weights of SmolLM2-135M's linear layers, and of its tied output head."""

HEADER = (
    "",
    "tokens/s",
    "samples/s",
    "× TRL default",
    "× TRL best",
    "peak GiB",
    "÷ TRL default",
    "of GEMM peak",
)


def write_report(figures: Mapping[str, Any], folder: Path) -> str:
    """Write ``speed.md`` and ``speed.svg``; return the first."""
    machine = figures["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    parts = [
        f"Measured on {machine['date']}, {machine['device']}; bf16 GEMM {figures['gemm'] / 1e9:.0f} GFLOP/s;"
        f" {libraries}; our trainer with {machine['allocator']}. Medians of interleaved rounds."
    ]
    parts += [f"### {name}\n\n{race_table(race, figures['gemm'])}" for name, race in figures["races"].items()]
    lines = [
        [name, contender, " ".join(f"{nats:.4f}" for nats in steps)]
        for name, off in figures["deviations"].items()
        for contender, steps in off.items()
    ]
    if lines:
        header = ["", "", "nats, step by step"]
        parts.append(
            f"### Loss in bf16, how far from the same contender's in fp32\n\n{markdown(header, lines)}"
        )
    if start := figures["start"]:
        parts.append(
            f"### Start\n\nFrom the trainer's start {start['begins']:.1f} s to its first step and"
            f" {start['ends']:.1f} s to that step's end."
        )
    if figures["precision"]:
        header = ["", "nats a token", "nats an answer"]
        lines = [
            [name, f"{off['token']:.4f}", f"{off['answer']:.3f}"]
            for name, off in figures["precision"].items()
        ]
        parts.append(
            "### Log-probabilities in bf16, root mean square from fp32's\n\n" + markdown(header, lines)
        )
    for name, rows in figures["sweeps"].items():
        lines = [[str(row[name]), f"{row['tokens_per_second']:.0f}", gib(row["peak"])] for row in rows]
        parts.append(f"### Growth with the {name}\n\n{markdown([name, 'tokens/s', 'peak GiB'], lines)}")
    text = "\n\n".join(parts) + "\n"
    (folder / "speed.md").write_text(text)
    plot(figures, folder / "speed.svg")
    return text


def race_table(race: Mapping[str, Mapping[str, Any]], gemm: float) -> str:
    """Compare the contenders of a race; tokens and useful FLOPs are counted once for all, as ours counts."""
    counted = next(one for one in race.values() if "tokens" in one)
    reference = {name: race.get(name) for name in ("TRL default", "TRL best")}
    lines = []
    for name, one in race.items():
        seconds = one["of_an_epoch"]
        flops = 4 * (WEIGHTS * counted["tokens"] + HEAD * counted["scored"])
        times = [
            "" if other is None else f"{other['of_an_epoch'] / seconds:.2f}" for other in reference.values()
        ]
        default = reference["TRL default"]
        lines.append(
            [
                name,
                f"{counted['tokens'] / seconds:.0f}",
                f"{one['samples'] / seconds:.2f}",
                *times,
                gib(one["peak"]),
                "" if default is None else f"{one['peak'] / default['peak']:.2f}",
                f"{flops / seconds / gemm:.0%}",
            ]
        )
    losses = {name: " ".join(f"{loss:.4f}" for loss in one["losses"][0]) for name, one in race.items()}
    return (
        markdown(HEADER, lines)
        + "\n\n"
        + markdown(["", "loss at each step of the first round"], losses.items())
    )


def markdown(header: Any, lines: Any) -> str:
    """Write a table."""
    rows = [list(header), ["---"] * len(list(header)), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def gib(size: float) -> str:
    """Write bytes."""
    return f"{size / 2**30:.2f}"


def plot(figures: Mapping[str, Any], file: Path) -> None:
    """Draw the races' speeds, and how speed and memory grow."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    races, sweeps = figures["races"], figures["sweeps"]
    figure, axes = pyplot.subplots(1, len(races) + len(sweeps), figsize=(4 * (len(races) + len(sweeps)), 4))
    axes = list(axes) if len(races) + len(sweeps) > 1 else [axes]
    for axis, (name, race) in zip(axes, races.items(), strict=False):
        tokens = next(one["tokens"] for one in race.values() if "tokens" in one)
        axis.barh(list(race)[::-1], [tokens / one["of_an_epoch"] for one in race.values()][::-1])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("tokens/s")
        axis.tick_params(labelsize=8)
    for axis, (name, rows) in zip(axes[len(races) :], sweeps.items(), strict=True):
        axis.plot([row[name] for row in rows], [row["tokens_per_second"] for row in rows], marker="o")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(name)
        axis.set_ylabel("tokens/s")
        memory = axis.twinx()
        memory.plot([row[name] for row in rows], [row["peak"] / 2**30 for row in rows], "C1--", marker="s")
        memory.set_ylim(bottom=0)
        memory.set_ylabel("peak GiB", color="C1")
        axis.set_title(f"growth with the {name}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
