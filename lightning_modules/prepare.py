"""The process that prepares a retraining's data: ``python -m lightning_modules.prepare /path/to/spec.json``.

Exit codes: 0 completed, 1 failed (the reason is in ``preparation-result.json``).
"""

from __future__ import annotations

import sys

from lightning_modules.process import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    describe,
    is_permanent,
    log_plainly,
    spec_file,
)
from lightning_modules.trained import write_whole
from post_training.schemas.preparation import (
    DATA_FOLDER,
    PREPARATION_RESULT_FILE,
    PreparationResult,
    PreparationSpec,
)


def main(argv: list[str] | None = None) -> int:
    """Prepare what a spec file describes; return the process's exit code."""
    path = spec_file("lightning_modules.prepare", argv)
    if path is None:
        return EXIT_FAILED
    try:
        result = _prepare(PreparationSpec.model_validate_json(path.read_bytes()))
    except Exception as error:
        result = PreparationResult(status="failed", error=describe(error), permanent=is_permanent(error))
        print(f"failed: {result.error}", file=sys.stderr)
    write_whole(path.parent / PREPARATION_RESULT_FILE, result.model_dump_json(indent=2))
    return EXIT_COMPLETED if result.status == "completed" else EXIT_FAILED


def _prepare(spec: PreparationSpec) -> PreparationResult:
    log_plainly()
    # Seconds of imports: a spec that cannot be read must not wait for them.
    from lightning_modules.preparation import prepare  # noqa: PLC0415

    prepared = prepare(spec)
    if spec.tracking is not None:
        from mlflow import MlflowClient  # noqa: PLC0415 - seconds, only a record needs it

        client = MlflowClient(tracking_uri=spec.tracking.tracking_uri)
        client.log_artifacts(spec.tracking.run_id, str(spec.work_dir / DATA_FOLDER), DATA_FOLDER)
    return PreparationResult(status="completed", sources=prepared.sources, held_out=prepared.held_out)


if __name__ == "__main__":
    sys.exit(main())
