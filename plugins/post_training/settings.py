"""The provider's section of Airflow's configuration, read and checked once."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from airflow.configuration import AIRFLOW_HOME, conf

from post_training.get_provider_info import OPTIONS, SECTION


@dataclass(frozen=True)
class Settings:
    """Deployment-wide settings; ``get_provider_info.OPTIONS`` says what each means."""

    home: Path
    allowed_roots: tuple[Path, ...]
    default_model: str | None
    trainer_python: str
    mlflow_conn_id: str
    post_training_conn_id: str
    pool: str
    queue: str | None
    pod_template_file: str | None
    ray_address: str | None
    ray_token: str | None
    ray_patience: int
    keep_state_in_mlflow: bool
    max_body_bytes: int
    max_data_uri_bytes: int
    max_data_bytes: int
    max_cache_bytes: int
    retraining_config: Path | None
    search_storage: str


def load_settings() -> Settings:
    """Read ``[post_training]``; the defaults hold too where the provider is not installed but only a folder.

    :raises ValueError: if a size or a time is not positive.
    """
    home = Path(_get("home").replace("{AIRFLOW_HOME}", AIRFLOW_HOME)).expanduser()
    return Settings(
        home=home,
        allowed_roots=allowed_roots(),
        default_model=_get("default_model") or None,
        trainer_python=_get("trainer_python") or sys.executable,
        mlflow_conn_id=_get("mlflow_conn_id"),
        post_training_conn_id=_get("post_training_conn_id"),
        pool=_get("pool"),
        queue=_get("queue") or None,
        pod_template_file=_get("pod_template_file") or None,
        ray_address=_get("ray_address") or None,
        ray_token=_get("ray_token") or None,
        ray_patience=_positive("ray_patience"),
        keep_state_in_mlflow=conf.getboolean(
            SECTION, "keep_state_in_mlflow", fallback=OPTIONS["keep_state_in_mlflow"][1] == "True"
        ),
        max_body_bytes=_positive("max_body_bytes"),
        max_data_uri_bytes=_positive("max_data_uri_bytes"),
        max_data_bytes=_positive("max_data_bytes"),
        max_cache_bytes=_positive("max_cache_bytes"),
        retraining_config=Path(file).expanduser() if (file := _get("retraining_config")) else None,
        search_storage=_get("search_storage") or f"sqlite:///{home}/searches.db",
    )


def allowed_roots() -> tuple[Path, ...]:
    """Return the folders of this machine that requests may name; read apart, as the deployment's name."""
    roots = _get("allowed_roots").split(",")
    return tuple(Path(root.strip()).expanduser().resolve() for root in roots if root.strip())


def deployment_name() -> str:
    """Return which Airflow this is, empty where nobody said; read apart, for every look into the record."""
    return _get("deployment") or conf.get("api", "base_url", fallback="") or ""


def _get(option: str) -> str:
    return conf.get(SECTION, option, fallback=OPTIONS[option][1]) or ""


def _positive(option: str) -> int:
    value = int(_get(option))
    if value <= 0:
        raise ValueError(f"[{SECTION}] {option} must be positive, got {value}")
    return value
