"""The table of a run, and its figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checks import CHECKS
from tests.chaos.run import Outcome


def figures(outcome: Outcome) -> dict[str, Any]:
    """Return what JSON keeps: faults by job and check, attempts, kills, recoveries."""
    killer = outcome.killer
    lost = Counter(job_uuid for done in killer.done for job_uuid in done.jobs)
    jobs = {
        job.job_uuid: {
            "kind": job.kind,
            "status": job.status["status"],
            "error": job.status.get("error"),
            "attempts": job.task["try_number"],
            "processes_lost": lost[job.job_uuid],
            "faults": {name: check(job) for name, check in CHECKS.items()},
        }
        for job in outcome.jobs
    }
    return {
        "jobs": jobs,
        "strikes": [asdict(done) for done in killer.done],
        "kills": dict(Counter(done.strike for done in killer.done)),
        "recovery_seconds": {name: sorted(seconds) for name, seconds in killer.recoveries.items()},
        "not_recovered": dict(killer.unrecovered()),
        "left_running": outcome.left_running,
        "unfinished_runs": outcome.unfinished_runs,
        "seconds": outcome.seconds,
    }


def faults(figures: dict[str, Any]) -> list[str]:
    """Return a sentence for everything that is not as it must be."""
    found = [
        f"{job_uuid}: {check}: {fault}"
        for job_uuid, job in figures["jobs"].items()
        for check, sentences in job["faults"].items()
        for fault in sentences
    ]
    found += [f"{name}: {count} times not back" for name, count in figures["not_recovered"].items()]
    if figures["left_running"]:
        found.append(f"{figures['left_running']} processes were left after stop")
    if figures["unfinished_runs"]:
        found.append(f"{figures['unfinished_runs']} runs in MLflow have not ended")
    return found


def show(figures: dict[str, Any], console: Console) -> None:
    """Print each job with its checks, the kills with their recoveries, and every fault."""
    jobs = Table("job", "kind", "status", "attempts", "processes lost", *CHECKS)
    for job_uuid, job in figures["jobs"].items():
        marks = ["[red]NO" if sentences else "ok" for sentences in job["faults"].values()]
        counts = [str(job["attempts"]), str(job["processes_lost"])]
        jobs.add_row(job_uuid, job["kind"], job["status"], *counts, *marks)
    console.print(jobs)
    kills = Table("struck", "times", "recovery, median s", "max s")
    for name, count in figures["kills"].items():
        seconds = figures["recovery_seconds"].get(name, [])
        spread = [f"{median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
        kills.add_row(name, str(count), *spread)
    console.print(kills)
    attempts = [job["attempts"] for job in figures["jobs"].values()]
    console.print(
        f"{len(attempts)} jobs, {sum(figures['kills'].values())} kills, {sum(attempts)} attempts,"
        f" {figures['seconds'] / 60:.1f} minutes"
    )
    for fault in faults(figures):
        console.print(f"[red]{fault}", highlight=False, soft_wrap=True)
