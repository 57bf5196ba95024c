"""What the documentation holds, as tests look at it: fenced blocks, links, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docker" / "README.md",
]
LANGUAGES = {"console", "python", "yaml", "text"}
"""Kinds of blocks, the last one of which is only looked at."""

_BLOCK = re.compile(r"^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    :param line: of the document, at which its text begins.
    """

    document: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a console, each on one line and without the comment behind it."""
        text = re.sub(r" *\\\n *", " ", self.text)
        lines = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
        return [re.sub(r"\s{2,}#.*", "", line) for line in lines]

    @property
    def file(self) -> str:
        """The file that a YAML block is, by its first line."""
        found = re.match(r"# (\S+\.yaml)\n", self.text)
        assert found is not None, f"{self.name}: its first line must name the file: # NAME.yaml"
        return found[1]


def blocks(document: Path) -> list[Block]:
    """Return a document's blocks in their order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, found.start("text")) + 1, found["language"], found["text"])
        for found in _BLOCK.finditer(text)
    ]


def prose(document: Path) -> str:
    """Return a document without its blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def links(document: Path) -> Iterator[str]:
    """Yield where a document's links and pictures lead."""
    return (found["target"] for found in _LINK.finditer(prose(document)))


def anchors(document: Path) -> set[str]:
    """Return what the headings of a document are called in links, as GitHub calls them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(document: Path) -> list[str]:
    """Return what stands between single backticks."""
    return _CODE.findall(prose(document))


DOCUMENTED_TORCHRUN = (
    "torchrun --nnodes 1:2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint NODE0:29400 --rdzv-id JOB"
    " -m lightning_modules.train spec.json"
)

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "make demo": (".ci/run::make demo DETACH=1",),
    "make demo DETACH=1": (".ci/run::make demo DETACH=1",),
    "make stop": (".ci/run::make stop",),
    "make test": (".ci/run::make test",),
    "make bench DATA=../shared/data": (
        "tests/benchmarks/test_speed.py::test_contenders_train_the_same_rows",
        "tests/benchmarks/test_speed_report.py::test_ratios_are_of_the_seconds_and_shares_of_the_useful_products",
    ),
    "make load": (
        "tests/system/test_load.py::test_distinct_jobs_at_once",
        "tests/system/test_load.py::test_the_same_job_at_once",
    ),
    "make chaos": ("tests/system/test_chaos.py::test_jobs_outlive_the_death_of_everything_around_them",),
    "post-training up --detach": (
        "tests/test_standalone.py::test_both_servers_start_run_a_dag_and_leave_nothing",
    ),
    "make cluster": (
        "tests/system/test_cluster.py::"
        "test_a_job_whose_worker_is_lost_goes_on_on_the_other_from_mlflows_state",
    ),
    "CPU_WORKERS=2 DATA=$PWD/data make cluster": (
        "tests/system/test_cluster.py::"
        "test_a_job_whose_worker_is_lost_goes_on_on_the_other_from_mlflows_state",
    ),
    "pip install .": (
        "tests/test_packaging.py::test_installed_it_is_a_provider_with_its_plugin_and_connections",
    ),
    "pip install '.[train]'": (".ci/run::make test",),  # which installs '.[dev]', of which it is a part
    "pip install '.[search]'": (".ci/run::make test",),
    "sudo apt-get install libtcmalloc-minimal4": (".ci/run::install libtcmalloc-minimal4",),
    "mlflow models serve --model-uri models:/m-… --env-manager local --port 8008": (
        "tests/system/test_jobs.py::test_mlflow_serves_a_checkpoint",
    ),
    DOCUMENTED_TORCHRUN: (
        "tests/lightning_modules/test_several_nodes.py::"
        "test_two_nodes_and_then_one_train_what_one_process_trains",
    ),
    "airflow db migrate": ("tests/test_standalone.py::test_both_servers_start_run_a_dag_and_leave_nothing",),
}
"""Commands that ``tests/system/test_docs.py`` does not run -> the tests, or lines of CI, that do."""

NO_ENGINE = (
    "no container engine runs where this is tested: tests/docker hold Dockerfile and compose files against"
    " their rules, tests/system/test_cluster.py runs the same services as processes"
)
NO_GPU_ENGINE = f"{NO_ENGINE}; and there is no GPU"
NO_KUBERNETES = "there is no Kubernetes: tests/docker/test_kubernetes.py looks at the values and the template"
NOT_RUN: dict[str, str] = {
    "(cd docker && docker compose up)": NO_ENGINE,
    "docker compose exec api-server cat /run/people/passwords.json": NO_ENGINE,
    "docker compose exec mlflow cat /run/secrets/admin_password": NO_ENGINE,
    'docker compose exec scheduler airflow pools set default_pool 1024 "Default pool"': NO_ENGINE,
    "docker compose run --rm --no-TTY secrets"
    " python /opt/init/secret_files.py keep ray /secrets/base < token": (
        f"{NO_ENGINE}, tests/docker/test_secret_files.py the program"
    ),
    "docker compose up --detach --force-recreate": NO_ENGINE,
    "docker compose cp worker-default:/run/secrets secrets": NO_ENGINE,
    "docker compose up": NO_GPU_ENGINE,
    "COMPOSE_PROFILES=gpus-4 docker compose up": NO_GPU_ENGINE,
    "docker build -f docker/Dockerfile --target airflow --build-arg EXTRAS=cluster,kubernetes,search"
    " -t REGISTRY/post-training-airflow:0.1.0 .": NO_ENGINE,
    "docker build -f docker/Dockerfile --target trainer --build-arg TORCH_INDEX=https://pypi.org/simple"
    " -t REGISTRY/post-training-trainer:0.1.0 .": NO_ENGINE,
    "docker push REGISTRY/post-training-airflow:0.1.0": NO_ENGINE,
    "docker push REGISTRY/post-training-trainer:0.1.0": NO_ENGINE,
    "kubectl create configmap post-training-templates --from-file=docker/kubernetes/trainer-pod.yaml": (
        NO_KUBERNETES
    ),
    "helm repo add apache-airflow https://airflow.apache.org": NO_KUBERNETES,
    "helm install airflow apache-airflow/airflow --values docker/kubernetes/values.yaml": NO_KUBERNETES,
}
"""Commands that nothing runs -> why."""
