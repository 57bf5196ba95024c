"""The Helm values and the trainer's pod, as far as they can be tried without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.compose import interpolated

KUBERNETES = Path(__file__).resolve().parents[2] / "docker" / "kubernetes"
VALUES: dict[str, Any] = yaml.safe_load((KUBERNETES / "values.yaml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((KUBERNETES.parent / "compose.yaml").read_text())
README = (KUBERNETES.parent / "README.md").read_text()


ONLY_WITH_CELERY = {
    "AIRFLOW__CELERY__BROKER_URL",
    "AIRFLOW__CELERY__RESULT_BACKEND",
    "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT",
    "AIRFLOW__POST_TRAINING__QUEUE",  # here each task has a pod of its own
}
OF_THE_CHART = {
    "AIRFLOW__API__BASE_URL",
    "AIRFLOW__API__SECRET_KEY",
    "AIRFLOW__API_AUTH__JWT_SECRET",
    "AIRFLOW__CORE__DAGS_FOLDER",
    "AIRFLOW__CORE__EXECUTION_API_SERVER_URL",
    "AIRFLOW__CORE__EXECUTOR",
    "AIRFLOW__CORE__FERNET_KEY",
    "AIRFLOW__CORE__LOAD_EXAMPLES",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
    "AIRFLOW__LOGGING__BASE_LOG_FOLDER",
}
"""What the chart says itself, or makes of its values that are no variables."""

BY_OTHER_MEANS = {
    "AIRFLOW__POST_TRAINING__DEFAULT_MODEL",  # empty in compose.yaml too: for who wants it
    "AIRFLOW__SECRETS__BACKEND",  # connections are variables here
    "AIRFLOW__SECRETS__BACKEND_KWARGS",
}
AS_AIRFLOW_HAS_THEM = {
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT",
}
"""How soon one machine's servers notice each other's ends, and how seldom they read what does not change."""


def told() -> dict[str, str]:
    """Variables of the chart's servers; a secret's value is empty."""
    config = {
        f"AIRFLOW__{section}__{key}".upper(): str(value)
        for section, keys in VALUES["config"].items()
        for key, value in keys.items()
    }
    secret = [entry["envName"] for entry in VALUES["secret"]]
    secret += [entry["name"] for entry in yaml.safe_load(VALUES["extraEnv"])]
    return config | {entry["name"]: entry["value"] for entry in VALUES["env"]} | dict.fromkeys(secret, "")


@pytest.fixture(scope="module")
def pod() -> Any:
    """The template as the executor reads it: into the Kubernetes client's own types."""
    from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator

    return PodGenerator.deserialize_model_file(str(KUBERNETES / "trainer-pod.yaml"))


def test_the_executor_finds_its_container_with_one_gpu(pod: Any) -> None:
    (container,) = pod.spec.containers
    assert container.name == "base"
    assert container.resources.limits["nvidia.com/gpu"] == "1"
    assert pod.spec.restart_policy == "Never"


def test_it_runs_as_nobody_special(pod: Any) -> None:
    assert pod.spec.security_context.run_as_non_root
    assert not pod.spec.containers[0].security_context.allow_privilege_escalation


def test_what_is_mounted_is_there(pod: Any) -> None:
    volumes = {volume.name for volume in pod.spec.volumes}
    assert {mount.name for mount in pod.spec.containers[0].volume_mounts} == volumes


def test_trainer_and_servers_are_told_the_same(pod: Any) -> None:
    servers = {entry["name"]: entry["value"] for entry in VALUES["env"]}
    trainer = {entry.name: entry.value for entry in pod.spec.containers[0].env if entry.value is not None}
    both = servers.keys() & trainer.keys()
    assert {name for name in both if name.startswith("AIRFLOW__POST_TRAINING__")}
    assert {name: servers[name] for name in both} == {name: trainer[name] for name in both}
    assert trainer["AIRFLOW__CORE__EXECUTOR"] == VALUES["executor"]


def test_the_template_lies_where_the_scheduler_looks_for_it() -> None:
    servers = {entry["name"]: entry["value"] for entry in VALUES["env"]}
    (mount,) = VALUES["scheduler"]["extraVolumeMounts"]
    place = f"{mount['mountPath']}/trainer-pod.yaml"
    assert servers["AIRFLOW__POST_TRAINING__POD_TEMPLATE_FILE"] == place


def test_no_secret_stands_in_a_file_and_each_is_explained(pod: Any) -> None:
    named = {entry["secretName"] for entry in VALUES["secret"]}
    named |= {value for key, value in VALUES.items() if key.endswith("SecretName") or key == "jwtSecretName"}
    named |= {VALUES["data"]["metadataSecretName"]}
    volumes = VALUES["apiServer"]["extraVolumes"]
    named |= {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    named |= {entry["valueFrom"]["secretKeyRef"]["name"] for entry in yaml.safe_load(VALUES["extraEnv"])}
    named |= {
        entry.value_from.secret_key_ref.name for entry in pod.spec.containers[0].env if entry.value_from
    }
    assert len(named) == 8
    assert all(name in README for name in named)


def test_servers_are_told_what_composes_are_but_for_what_is_named() -> None:
    said = interpolated(COMPOSE["services"]["scheduler"]["environment"], {})
    compose = {name.removesuffix("_CMD"): value for name, value in said.items()}
    helm = told()
    missing = compose.keys() - helm.keys()
    assert missing == ONLY_WITH_CELERY | OF_THE_CHART | BY_OTHER_MEANS | AS_AIRFLOW_HAS_THEM
    values = {name: value for name, value in said.items() if name in helm and value != helm[name]}
    assert values == {
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": "/run/people/passwords.json",
        "AIRFLOW__POST_TRAINING__DEPLOYMENT": "compose",
    }


def test_a_trainers_pod_is_told_what_composes_workers_are(pod: Any) -> None:
    said = interpolated(COMPOSE["services"]["worker-cpu"]["environment"], {})
    compose = {name.removesuffix("_CMD"): value for name, value in said.items()}
    trainer = {entry.name: entry.value for entry in pod.spec.containers[0].env}
    missing = compose.keys() - trainer.keys()
    assert missing - ONLY_WITH_CELERY - OF_THE_CHART - BY_OTHER_MEANS == {
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED",  # servers alone send it
        "WORKER",
    }
