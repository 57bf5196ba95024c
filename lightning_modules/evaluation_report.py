"""An evaluation's tables and picture as files, and in its MLflow run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric

from lightning_modules.evaluation import Comparison
from lightning_modules.record import now_ms
from lightning_modules.tables import TABLES, upload_tables, write_table
from lightning_modules.trained import write_whole
from post_training.schemas.evaluation import VALUES_FILE, EvaluationConfig, EvaluationValues
from post_training.schemas.record import METRIC_DEVICE_SECONDS

METRICS_TABLE, SAMPLES_TABLE, FIGURE = "evaluation.json", "samples.json", "evaluation.png"


def write_report(comparison: Comparison, config: EvaluationConfig, folder: Path) -> None:
    """Write metrics, samples, the values of each example and a picture.

    :param folder: the evaluation's own, which holds nothing else of these names.
    """
    metrics = comparison.metrics
    names = list(dict.fromkeys(metric for of_model in metrics.values() for metric in of_model))
    lines = [[model, *(of_model[name] for name in names)] for model, of_model in metrics.items()]
    write_table(folder, METRICS_TABLE, ["model", *names], lines)
    write_table(folder, SAMPLES_TABLE, *_samples(comparison, config.samples))
    values = EvaluationValues(models=comparison.values)
    write_whole(folder / VALUES_FILE, values.model_dump_json())
    _draw(metrics, names, folder / FIGURE)


def _samples(comparison: Comparison, limit: int) -> tuple[list[str], list[list[object]]]:
    """Return columns and rows of the table of answers, side by side."""
    rows: list[list[object]] = [
        [number, question.text, question.expected, *(given[number] for given in comparison.answers.values())]
        for number, question in list(comparison.questions.items())[:limit]
    ]
    return ["row", "question", "expected", *comparison.answers], rows


def _draw(metrics: Mapping[str, Mapping[str, float]], names: Sequence[str], file: Path) -> None:
    """Draw a panel of bars for each metric, a bar for each model."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - seconds

    figure = Figure(figsize=(2.6 * len(names), 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        bars = panel.bar(list(metrics), [of_model[name] for of_model in metrics.values()], color="tab:blue")
        panel.bar_label(bars, fmt="%.3g")
        panel.set_title(name)
        panel.tick_params(axis="x", rotation=30)
        panel.margins(y=0.15)
    figure.savefig(file, dpi=120)


def record_report(
    client: MlflowClient, run_id: str, comparison: Comparison, device_seconds: float, folder: Path
) -> None:
    """Put a written report into a run; a later one takes its place, but for points of metrics, which stay.

    :param device_seconds: what the comparison took, from reading the first model on.
    :raises Exception: MLflow's, which a later try may overcome.
    """
    now = now_ms()
    points = [
        Metric(f"{model}/{name}", value, now, 0)
        for model, of_model in comparison.metrics.items()
        for name, value in of_model.items()
    ]
    points.append(Metric(METRIC_DEVICE_SECONDS, device_seconds, now, 0))
    client.log_batch(run_id, metrics=points, synchronous=True)
    upload_tables(client, run_id, folder / TABLES, [METRICS_TABLE, SAMPLES_TABLE])
    for name in (VALUES_FILE, FIGURE):
        client.log_artifact(run_id, str(folder / name))
