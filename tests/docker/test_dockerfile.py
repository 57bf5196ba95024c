"""The Dockerfile under its linter, and that it copies what is there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "docker" / "README.md").read_text()
OF_TRAINERS = {"torch", "torchao", "lightning", "transformers", "peft", "bitsandbytes", "triton"}


def stage(name: str) -> list[str]:
    """A stage's instructions, each on one line."""
    text = re.sub(r"\\\n\s*(#.*\n\s*)?", "", DOCKERFILE.read_text())
    return re.split(r"^FROM .*\n", re.split(rf"^FROM \S+ AS {name}\n", text, flags=re.M)[1], flags=re.M)[
        0
    ].splitlines()


def closure(extras: set[str]) -> set[str]:
    """The packages that our own brings with these extras, and theirs, as the installed ones say."""
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    left = [Requirement(text) for text in wanted]
    seen: set[tuple[str, str]] = set()
    while left:
        one = left.pop()
        for extra in {"", *one.extras}:
            key = (canonicalize_name(one.name), extra)
            if key in seen:
                continue
            seen.add(key)
            needed = [Requirement(text) for text in requires(one.name) or []]
            left += [need for need in needed if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


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


@pytest.mark.parametrize("extras", ["cluster", *re.findall(r"EXTRAS=(\S+)", README)])
def test_an_image_of_servers_has_nothing_of_a_trainer(extras: str) -> None:
    assert "ARG EXTRAS=cluster" in stage("build")
    (install,) = [line for line in stage("build") if "pip install" in line]
    assert install.endswith('".[${EXTRAS}]"')
    assert "COPY --from=build /opt/venv /opt/venv" in stage("airflow")
    assert not [line for line in stage("airflow") if "pip install" in line]
    found = closure({*extras.split(",")})
    assert {"apache-airflow-core", "celery", "mlflow"} <= found
    assert not found & OF_TRAINERS


def test_a_trainers_image_has_all_of_it() -> None:
    (install,) = [line for line in stage("build-trainer") if "pip install" in line]
    extras = re.search(r"\.\[([a-z,]+)\]", install)
    assert extras
    assert closure({*extras[1].split(",")}) >= OF_TRAINERS - {"triton"}  # which torch brings with CUDA
    assert "COPY --from=build-trainer /opt/venv /opt/venv" in stage("trainer")
