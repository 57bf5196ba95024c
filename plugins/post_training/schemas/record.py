"""Names in the job's MLflow run, shared by those who write them and those who read them."""

from __future__ import annotations

from typing import Final

REQUEST_TASK_ID: Final = "train"
"""Task of the request DAGs that runs the job."""

CONF_MLFLOW_RUN: Final = "mlflow_run_id"
"""Key in a DAG run's conf beside the request's own: the run that was made at submit."""

# Tags of the run.
TAG_JOB_UUID: Final = "post_training.job_uuid"
TAG_PAYLOAD_HASH: Final = "post_training.payload_hash"
TAG_METHOD: Final = "post_training.method"
TAG_DAG_ID: Final = "airflow.dag_id"
TAG_RUN_ID: Final = "airflow.run_id"
TAG_TASK_ID: Final = "airflow.task_id"
TAG_MAP_INDEX: Final = "airflow.map_index"
TAG_ATTEMPT: Final = "post_training.attempt"
TAG_ATTEMPT_ID: Final = "post_training.attempt_id"
"""Airflow's id of the newest attempt's task instance, a UUID of version 7: a later attempt's is greater."""

TAG_FOLLOWED: Final = "post_training.followed_attempt"
"""Id of the attempt whose job on a Ray cluster the newest attempt follows, instead of one of its own."""

TAG_MAX_TRIES: Final = "post_training.max_tries"
"""Airflow's limit of tries when the job was finished; clearing the task raises it, a retry does not."""

TAG_RESUME_STATE: Final = "post_training.resume_state"
"""JSON of ``schemas.trainer.StoredState``."""

TAG_INPUTS: Final = "post_training.inputs"
"""SHA-256 of what the run's metrics and checkpoints were trained from: request, model and data."""

TAG_SUPERSEDES: Final = "post_training.supersedes"
"""The run that holds what earlier attempts at the job trained, of other data or by another request."""

TAG_CANCELLED_ATTEMPT: Final = "post_training.cancelled_attempt"
"""Id of the attempt that somebody asked to stop."""

TAG_TRAIN_DATA: Final = "post_training.train_data"
TAG_VALIDATION_DATA: Final = "post_training.validation_data"
"""URI of the version of a registered data set that all attempts at the job read."""

TAG_DEPLOYMENT: Final = "post_training.deployment"
"""Which Airflow the job is of: others may write to the same MLflow."""

NO_DEPLOYMENT: Final = "none"
"""The value of that tag where no Airflow runs the job: none may take its run for one of its own."""

TAG_AIRFLOW_URL: Final = "airflow.url"
TAG_PARENT_RUN: Final = "mlflow.parentRunId"
"""MLflow shows a run below the one that this tag names."""

TAG_STAGE: Final = "post_training.stage"
"""SHA-256 of a task's place in Airflow, whose run is no job's: it prepares, evaluates or decides."""

TAG_ERROR: Final = "post_training.error"
TAG_RESOURCES: Final = "post_training.resources"
"""JSON of what the trainer used so far: see ``lightning_modules.callbacks.Resources``."""

TAG_WARNING: Final = "post_training.warning"
TAG_DESCRIPTION: Final = "mlflow.note.content"
"""MLflow's own, for text that its pages show above a run, as Markdown."""

# Tags of a search's trial, whose run is below the job's; and of the job's run.
TAG_TRIAL: Final = "post_training.trial"
TAG_TRIAL_STATE: Final = "post_training.trial_state"
"""running, complete, pruned or failed."""

TAG_BEST_TRIAL: Final = "post_training.best_trial"
"""Number of the trial whose checkpoints or values the job has."""

TAG_BEST_RUN: Final = "post_training.best_trial_run"
"""The MLflow run of that trial."""

# Tags of a retraining's run, the parent of its stages' runs.
TAG_REGISTERED_MODEL: Final = "post_training.registered_model"
TAG_NIGHT: Final = "post_training.night"
"""SHA-256 of what a retraining is made from: its configuration and the data."""

TAG_DECISION: Final = "post_training.decision"
ACCEPTED: Final = "accepted"
"""By the gates; whether it is promoted is open."""

PROMOTED: Final = "promoted"
REJECTED: Final = "rejected"
SKIPPED: Final = "skipped"
FAILED: Final = "failed"
EXPIRED: Final = "expired"
"""Accepted, and not approved in time."""

TAG_REASON: Final = "post_training.reason"
"""Why, in one sentence."""

# Tags of a checkpoint, which is a logged model.
TAG_CHECKPOINT: Final = "post_training.checkpoint"
"""JSON of ``schemas.jobs.PostTrainingMetric``."""

TAG_CHECKPOINT_COPY_PREFIX: Final = "post_training.checkpoint."
"""Before the epoch, in a tag of the run: JSON of a ``schemas.jobs.Checkpoint`` that is no logged model."""

# Metrics by optimizer step.
METRIC_TRAIN_LOSS: Final = "train_loss"
METRIC_VALIDATION_LOSS: Final = "validation_loss"
METRIC_PERPLEXITY: Final = "perplexity"
METRIC_EPOCH: Final = "epoch"
METRIC_LEARNING_RATE: Final = "learning_rate"
METRIC_GRADIENT_NORM: Final = "gradient_norm"
METRIC_TOKENS_PER_SECOND: Final = "tokens_per_second"
METRIC_PEAK_MEMORY_BYTES: Final = "peak_memory_bytes"
"""The most that the attempt has held at once so far: of the device, or of the process on a CPU."""

METRIC_TOKENS_SEEN: Final = "tokens_seen"
METRIC_PROGRESS: Final = "progress"
METRIC_SECONDS_LEFT: Final = "seconds_left"
METRIC_CHECKPOINT_BYTES: Final = "checkpoint_bytes"
"""Size on disk of a checkpoint's weights."""

METRIC_DEVICE_SECONDS: Final = "device_seconds"
METRIC_JOB_TOKENS: Final = "job_tokens"
"""At the job's end: what all its attempts used, as in the tag of its resources."""

# At step 0, before the first step: what the job is expected to need.
METRIC_ESTIMATED_TOKENS: Final = "estimated_tokens"
METRIC_ESTIMATED_TOKENS_PER_EPOCH: Final = "estimated_tokens_per_epoch"
METRIC_ESTIMATED_MEMORY_BYTES: Final = "estimated_memory_bytes"
METRIC_ESTIMATED_SECONDS: Final = "estimated_seconds"
"""Left out where no job of the kind was measured on such a machine before."""

# Of preference jobs, under the names that TRL made known.
METRIC_REWARD_CHOSEN: Final = "rewards/chosen"
METRIC_REWARD_REJECTED: Final = "rewards/rejected"
METRIC_REWARD_ACCURACY: Final = "rewards/accuracies"
METRIC_REWARD_MARGIN: Final = "rewards/margins"
METRIC_REWARD_CLIPPED: Final = "rewards/clipped_fraction"
METRIC_KL: Final = "kl"

METRIC_SEARCH_SECONDS: Final = "search_device_seconds"
METRIC_SEARCH_TOKENS: Final = "search_tokens"
"""At a search's end: what all its trials used."""

VALIDATION_PREFIX: Final = "validation_"
"""Before the name of a metric that was measured in validation."""

# Folders of the run's artifacts.
ARTIFACT_REQUEST: Final = "request.json"
ARTIFACT_LOGS: Final = "logs"
ARTIFACT_RESUME: Final = "resume"
ARTIFACT_SEARCH: Final = "search"
