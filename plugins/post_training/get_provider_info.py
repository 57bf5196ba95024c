"""What Airflow reads of the provider: connection types, settings, operators."""

from __future__ import annotations

from typing import Any

from post_training import __version__

SECTION = "post_training"

OPTIONS: dict[str, tuple[str, str, str]] = {
    "home": (
        "string",
        "{AIRFLOW_HOME}/post_training",
        "Folder of the jobs' working files; the workers of one deployment share it or keep one each.",
    ),
    "allowed_roots": (
        "string",
        "",
        "Comma-separated folders below which requests may name data sets, models and checkpoint folders.",
    ),
    "default_model": ("string", "", "Base model of requests that name none; empty refuses them."),
    "trainer_python": (
        "string",
        "",
        "Interpreter of the trainer, with the extra 'train' installed; empty is Airflow's own.",
    ),
    "deployment": (
        "string",
        "",
        "Name of this Airflow among those that share an MLflow server; empty is its [api] base_url.",
    ),
    "mlflow_conn_id": ("string", "mlflow_default", "Connection of type mlflow: the tracking server."),
    "post_training_conn_id": (
        "string",
        "post_training_default",
        "Connection of type post_training: the HTTP API, and the defaults of the runtime block.",
    ),
    "pool": ("string", "default_pool", "Airflow pool that training tasks take their slots from."),
    "queue": (
        "string",
        "",
        "Queue that training, evaluating and preparing tasks are sent to, for workers with the devices they"
        " need; empty is Airflow's default queue.",
    ),
    "pod_template_file": (
        "string",
        "",
        "Pod template that the KubernetesExecutor makes such tasks' pods from, a path in the scheduler's pod;"
        " empty is the executor's own.",
    ),
    "ray_address": (
        "string",
        "",
        "Address of a Ray cluster's dashboard, http://HOST:8265, for jobs with runtime.launcher ray; empty"
        " refuses them.",
    ),
    "ray_token": (
        "string",
        "",
        "Token of that cluster (RAY_AUTH_TOKEN); empty where it has no authentication.",
    ),
    "ray_patience": (
        "integer",
        "300",
        "Seconds for which such a job waits for nodes that the cluster has not, or has lost, and its task for"
        " a cluster that does not answer.",
    ),
    "keep_state_in_mlflow": (
        "boolean",
        "True",
        "Whether the state that a retry goes on from is kept in MLflow too, for a retry on another worker;"
        " not needed where the workers share home, but for jobs on a Ray cluster.",
    ),
    "max_body_bytes": ("integer", "12582912", "Largest request body in bytes."),
    "max_data_uri_bytes": ("integer", "10485760", "Largest data: URI in bytes."),
    "max_data_bytes": (
        "integer",
        "4294967296",
        "Largest file in bytes that a trainer fetches from elsewhere, or a retraining prepares for its"
        " stages.",
    ),
    "max_cache_bytes": (
        "integer",
        "21474836480",
        "What trainers keep for each other below home, in bytes: tokenized data, reference log-probabilities,"
        " unpacked models. What was used longest ago goes first.",
    ),
    "retraining_config": (
        "string",
        "",
        "YAML file that configures the DAG scheduled_retraining; empty is the one beside the DAG.",
    ),
    "search_storage": (
        "string",
        "",
        "URL of Optuna's storage, which all workers reach: what hyperparameter searches have tried. Empty is"
        " an SQLite file below home, which is enough where the workers are on one machine.",
    ),
}
"""Setting -> (type, default, description)."""

SENSITIVE = frozenset({"ray_token", "search_storage"})
"""Settings that may hold a secret."""


def get_provider_info() -> dict[str, Any]:
    """Return the provider's description in Airflow's provider schema."""
    return {
        "package-name": "airflow-provider-post-training",
        "name": "Post-training",
        "description": "LLM post-training as Airflow tasks, recorded in MLflow.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": "Post-training",
                "external-doc-url": "https://pypi.org/project/airflow-provider-post-training/",
                "tags": ["ai"],
            }
        ],
        "operators": [
            {
                "integration-name": "Post-training",
                "python-modules": [
                    f"post_training.operators.{name}"
                    for name in (
                        "training",
                        "jobs",
                        "evaluation",
                        "promotion",
                        "retraining",
                        "search",
                        "search_trials",
                    )
                ],
            }
        ],
        "sensors": [
            {"integration-name": "Post-training", "python-modules": ["post_training.operators.sensors"]}
        ],
        "hooks": [{"integration-name": "Post-training", "python-modules": ["post_training.operators.hooks"]}],
        "triggers": [
            {"integration-name": "Post-training", "python-modules": ["post_training.operators.triggers"]}
        ],
        "extra-links": [
            f"post_training.operators.links.{name}"
            for name in ("JobLink", "MLflowRunLink", "CheckpointLink", "ModelVersionLink")
        ],
        "connection-types": [_mlflow_connection(), _post_training_connection()],
        "config": {
            SECTION: {
                "description": "Post-training jobs.",
                "options": {
                    name: {
                        "description": description,
                        "version_added": "0.1.0",
                        "type": type_,
                        "example": None,
                        "default": default,
                        **({"sensitive": True} if name in SENSITIVE else {}),
                    }
                    for name, (type_, default, description) in OPTIONS.items()
                },
            }
        },
    }


def _mlflow_connection() -> dict[str, Any]:
    return {
        "hook-class-name": "post_training.operators.hooks.MLflowHook",
        "hook-name": "MLflow tracking server",
        "connection-type": "mlflow",
        "conn-fields": {
            "experiment": {
                "label": "Experiment",
                "description": "Experiment that new runs go to.",
                "schema": {"type": ["string", "null"], "default": "post-training"},
            },
            "public_url": {
                "label": "Public URL",
                "description": "Address of the server in a browser, where it differs from the host.",
                "schema": {"type": ["string", "null"]},
            },
        },
        "ui-field-behaviour": {
            "hidden-fields": ["schema", "port", "extra"],
            "relabeling": {"host": "Tracking URI"},
            "placeholders": {"host": "http://mlflow:5000"},
        },
    }


def _post_training_connection() -> dict[str, Any]:
    return {
        "hook-class-name": "post_training.operators.hooks.PostTrainingHook",
        "hook-name": "Post-training API",
        "connection-type": "post_training",
        "conn-fields": {
            "runtime": {
                "label": "Runtime defaults",
                "description": "JSON object: defaults of the requests' runtime block.",
                "schema": {"type": ["object", "null"]},
            },
        },
        "ui-field-behaviour": {
            "hidden-fields": ["schema", "port", "extra"],
            "relabeling": {
                "host": "Base URL",
                "login": "Airflow user",
                "password": "Password, or a token if there is no user",
            },
            "placeholders": {"host": "http://airflow:8080/post-training"},
        },
    }
