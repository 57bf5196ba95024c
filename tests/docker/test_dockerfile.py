"""The Dockerfile under its linter, and that it copies what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def lint(text: str) -> str:
    done = subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_linter_finds_nothing() -> None:
    assert lint(DOCKERFILE.read_text()) == ""


def test_the_linter_finds_what_is_wrong() -> None:
    assert "DL3006" in lint("FROM python\n")


def test_both_images_run_as_somebody_who_is_not_root() -> None:
    targets = DOCKERFILE.read_text().split("FROM base AS ")
    for name in ("airflow", "trainer"):
        (lines,) = (target.splitlines() for target in targets if target.startswith(f"{name}\n"))
        assert [line for line in lines if line.startswith("USER")] == ["USER 50000"]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = {
        source
        for line in DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)
