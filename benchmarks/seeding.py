"""Many jobs' records at once: copies of one real job's rows, made inside the databases of Airflow and MLflow.

Copied is what the API and the page read of a list or of a job. XComs, rendered fields and files are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnClause,
    ColumnElement,
    Connection,
    Engine,
    MetaData,
    Table,
    Text,
    Uuid,
    case,
    cast,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    true,
    values,
)

from post_training.schemas.record import TAG_JOB_UUID

FAILED_OF = 10
"""Every so many-th copy of a job that has ended is one that has failed."""

_APART = 60
"""Seconds between one copy and the next, which is older."""

_KEYS = text(
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE conrelid = CAST(:table AS regclass) AND contype IN ('p', 'u')"
)
_INDEXES = text("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = :table")


@dataclass(frozen=True)
class Copied:
    """A table whose rows of a job are copied.

    :param whose: columns, one of which names the job or something of it.
    :param milliseconds: columns that hold a time as a number.
    :param failed: column of the state, and what it is of a job that has failed.
    :param numbered: whether the database gives each row a number ``id``.
    :param many: whether a job has dozens of rows here; no other table refers to them.
    """

    table: str
    whose: tuple[str, ...]
    milliseconds: tuple[str, ...] = ()
    failed: tuple[str, str] = ("", "")
    numbered: bool = False
    many: bool = False


AIRFLOW = (
    Copied("dag_run", ("run_id",), failed=("state", "failed"), numbered=True),
    Copied("task_instance", ("run_id",), failed=("state", "failed")),
    Copied("log", ("run_id",), numbered=True),
)
MLFLOW = (
    Copied("runs", ("run_uuid",), ("start_time", "end_time"), failed=("status", "FAILED")),
    Copied("params", ("run_uuid",), many=True),
    Copied("tags", ("run_uuid",), many=True),
    Copied("metrics", ("run_uuid",), ("timestamp",), many=True),
    Copied("latest_metrics", ("run_uuid",), ("timestamp",), many=True),
    Copied("logged_models", ("source_run_id",), ("creation_timestamp_ms", "last_updated_timestamp_ms")),
    Copied("logged_model_metrics", ("run_id",), ("metric_timestamp_ms",)),
    Copied("logged_model_params", ("model_id",)),
    Copied("logged_model_tags", ("model_id",)),
    Copied("inputs", ("source_id", "destination_id")),
    Copied("input_tags", ("input_uuid",)),
)


@dataclass(frozen=True)
class Pattern:
    """The job whose rows are copied, and what its copies are called.

    :param attempt_id: of its task in Airflow.
    :param digests: names of its run, checkpoints and inputs in MLflow, 32 hexadecimal digits each.
    :param prefix: of the copies' job_uuids, before their numbers.
    :param fails: whether some copies are jobs that have failed.
    """

    job_uuid: str
    attempt_id: str
    digests: tuple[str, ...]
    prefix: str
    fails: bool = False

    @property
    def owners(self) -> list[str]:
        """What its rows in any table are found by."""
        return [self.job_uuid, *self.digests, *(f"m-{digest}" for digest in self.digests)]

    def renamed(self, value: str, number: ColumnElement[int]) -> ColumnElement[Any]:
        """Return a text with the names that the copy of a number has instead of the job's."""
        made: ColumnElement[Any] = literal(value, Text)
        for name in (self.job_uuid, self.attempt_id, *self.digests):
            if name in value:
                made = func.replace(made, name, self._new_name(name, number))
        return made

    def _new_name(self, name: str, number: ColumnElement[int]) -> ColumnElement[Any]:
        if name == self.job_uuid:
            return func.concat(literal(self.prefix, Text), number)
        digest = func.md5(func.concat(literal(name, Text), number))
        return cast(cast(digest, Uuid), Text) if name == self.attempt_id else digest


@dataclass
class Database:
    """A database of PostgreSQL, written by a superuser.

    :param copied: the tables that hold jobs.
    """

    engine: Engine
    copied: tuple[Copied, ...]
    metadata: MetaData = field(default_factory=MetaData)

    def __post_init__(self) -> None:
        self.metadata.reflect(self.engine, only=[one.table for one in self.copied])

    def copy(self, pattern: Pattern, numbers: range) -> None:
        """Add copies of a job, one for each number, and have the database count its rows."""
        with self.engine.begin() as connection:
            # Rows of a job refer to each other alone: it need not be looked up millions of times.
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            for one in self.copied:
                with _without_indexes(connection, one.table) if one.many else nullcontext():
                    _copy(connection, self.metadata.tables[one.table], one, pattern, numbers)
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))


@contextmanager
def _without_indexes(connection: Connection, table: str) -> Iterator[None]:
    """Make the table's indexes and keys anew when all rows are there, which is many times faster."""
    of_table = {"table": table}
    keys = connection.execute(_KEYS, of_table).all()
    for name, _ in keys:
        connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
    indexes = connection.execute(_INDEXES, of_table).all()
    for name, _ in indexes:
        connection.execute(text(f"DROP INDEX {name}"))
    yield
    for definition in (definition for _, definition in indexes):
        connection.execute(text(definition))
    for name, definition in keys:
        connection.execute(text(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}"))


def _copy(connection: Connection, table: Table, copied: Copied, pattern: Pattern, numbers: range) -> None:
    columns = [column for column in table.columns if not (copied.numbered and column.name == "id")]
    whose = or_(*(table.c[name].in_(pattern.owners) for name in copied.whose))
    rows = connection.execute(select(*columns).where(whose)).mappings().all()
    if not rows:
        return
    series = (
        func.generate_series(numbers.start, numbers.stop - 1).table_valued("number").render_derived("copies")
    )
    made = (
        values(*(ColumnClause(column.name, column.type) for column in columns), name="made")
        .data([_cells(columns, row, copied, pattern, series.c.number) for row in rows])
        .lateral()
    )
    # Copy by copy, as jobs come: the rows of one lie together.
    connection.execute(
        insert(table).from_select(columns, select(*made.c).select_from(series.join(made, true())))
    )


def _cells(
    columns: Sequence[Column[Any]],
    row: Mapping[Any, Any],
    copied: Copied,
    pattern: Pattern,
    number: ColumnElement[int],
) -> tuple[ColumnElement[Any], ...]:
    """Return a row as the copy of a number has it."""
    cells = []
    for column in columns:
        value = _value(row[column], pattern, number)
        if column.name in copied.milliseconds and row[column] is not None:
            value = literal(row[column]) - cast(number, BigInteger) * (1000 * _APART)
        if pattern.fails and column.name == copied.failed[0]:
            value = case((number % FAILED_OF == 0, literal(copied.failed[1])), else_=value)
        cells.append(cast(value, column.type))
    return tuple(cells)


def _value(value: Any, pattern: Pattern, number: ColumnElement[int]) -> ColumnElement[Any]:
    if isinstance(value, datetime):
        return literal(value) - number * text(f"interval '{_APART} seconds'")
    if isinstance(value, dict | list):
        return pattern.renamed(json.dumps(value), number)
    if isinstance(value, str | UUID):
        return pattern.renamed(str(value), number)
    return literal(value)


def pattern_of(
    airflow: Database, mlflow: Database, job_uuid: str, prefix: str, *, fails: bool = False
) -> Pattern:
    """Find a job's names in both databases.

    :raises sqlalchemy.exc.NoResultFound: if there is no such job.
    """
    tasks, tags = airflow.metadata.tables["task_instance"], mlflow.metadata.tables["tags"]
    models, inputs = mlflow.metadata.tables["logged_models"], mlflow.metadata.tables["inputs"]
    with airflow.engine.connect() as connection:
        attempt = connection.scalars(select(tasks.c.id).where(tasks.c.run_id == job_uuid)).one()
    with mlflow.engine.connect() as connection:
        is_its = (tags.c.key == TAG_JOB_UUID, tags.c.value == job_uuid)
        run = connection.scalars(select(tags.c.run_uuid).where(*is_its)).one()
        made = connection.scalars(select(models.c.model_id).where(models.c.source_run_id == run)).all()
        used = or_(inputs.c.source_id == run, inputs.c.destination_id == run)
        named = connection.scalars(select(inputs.c.input_uuid).where(used)).all()
    digests = (run, *(model_id.removeprefix("m-") for model_id in made), *named)
    return Pattern(job_uuid, str(attempt), digests, prefix, fails)
