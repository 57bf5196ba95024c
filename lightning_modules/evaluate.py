"""The evaluation process: ``python -m lightning_modules.evaluate /path/to/evaluation.json``.

Exit codes: 0 completed, 1 failed (the reason is in ``evaluation-result.json``).
"""

from __future__ import annotations

import sys
import time

from lightning_modules.process import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    describe,
    importing,
    is_permanent,
    log_plainly,
    quieten_libraries,
    spec_file,
)
from lightning_modules.trained import write_whole
from post_training.schemas.evaluation import EVALUATION_RESULT_FILE, EvaluationResult, EvaluationSpec


def main(argv: list[str] | None = None) -> int:
    """Evaluate what a spec file describes; return the process's exit code."""
    path = spec_file("lightning_modules.evaluate", argv)
    if path is None:
        return EXIT_FAILED
    try:
        result = _evaluate(EvaluationSpec.model_validate_json(path.read_bytes()))
    except Exception as error:
        result = EvaluationResult(status="failed", error=describe(error), permanent=is_permanent(error))
        print(f"failed: {result.error}", file=sys.stderr)
    write_whole(path.parent / EVALUATION_RESULT_FILE, result.model_dump_json(indent=2))
    return EXIT_COMPLETED if result.status == "completed" else EXIT_FAILED


def _evaluate(spec: EvaluationSpec) -> EvaluationResult:
    log_plainly()
    # Seconds of imports: a spec that cannot be read must not wait for them.
    with importing():
        from mlflow import MlflowClient  # noqa: PLC0415

        from lightning_modules.evaluation import evaluate  # noqa: PLC0415
        from lightning_modules.evaluation_report import record_report, write_report  # noqa: PLC0415

    quieten_libraries()
    started = time.monotonic()
    comparison = evaluate(spec)
    device_seconds = time.monotonic() - started
    write_report(comparison, spec.config, spec.work_dir)
    if spec.tracking is not None:
        client = MlflowClient(tracking_uri=spec.tracking.tracking_uri)
        record_report(client, spec.tracking.run_id, comparison, device_seconds, spec.work_dir)
    return EvaluationResult(status="completed", metrics=dict(comparison.metrics))


if __name__ == "__main__":
    sys.exit(main())
