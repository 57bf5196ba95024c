"""The Helm values and the trainer's pod, as far as they can be tried without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).resolve().parents[2] / "docker" / "kubernetes"
VALUES: dict[str, Any] = yaml.safe_load((KUBERNETES / "values.yaml").read_text())
README = (KUBERNETES.parent / "README.md").read_text()


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
    named |= {
        entry.value_from.secret_key_ref.name for entry in pod.spec.containers[0].env if entry.value_from
    }
    assert len(named) == 7
    assert all(name in README for name in named)
