"""LLM post-training jobs as Airflow tasks, recorded in MLflow."""

__version__ = "0.1.0"
