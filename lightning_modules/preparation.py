"""The data of one retraining: what is trained on, what is held back, and what was trained on before."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_modules.data.content import RawDataset, Row, blocks
from lightning_modules.data.formats import FORMATS, PREFERENCE_FORMATS, Turn, tools_of
from lightning_modules.data.messages import BadRowError, Message
from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits, fetch, first_line, shown
from lightning_modules.data.tokenize import Tools, check_bad_rows
from post_training.errors import DataError
from post_training.schemas.preparation import (
    DATA_FOLDER,
    DIGESTS_FILE,
    HeldOutSource,
    Part,
    PreparationSource,
    PreparationSpec,
    PreparedSource,
    SplitConfig,
)
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest

log = logging.getLogger(__name__)

PARTS: tuple[Part, ...] = get_args(Part)

DIGEST_BYTES = 16
"""Of an identity or a question's hash that are kept: two of a billion share them once in 10²⁰ times."""

QUESTION_DOMAIN = b"post_training.split/1\0"
"""Stands before a question in the hash that decides its part, which no other hash shall repeat."""

Conversations = Sequence[Sequence[Message]]
Digests = NDArray[np.bytes_]
"""Sixteen bytes each; numpy would leave zeros at the end of a single one out, so they are taken together."""

CONVERSATIONS: Mapping[str, Callable[[str, Mapping[str, Any]], Sequence[Sequence[Turn]]]] = {
    SupervisedFineTuneRequest.method: lambda data_format, row: [FORMATS[data_format](row)],
    PreferenceOptimizeRequest.method: lambda data_format, row: PREFERENCE_FORMATS[data_format](row),
}
"""What each training method reads in a row, as ``registry.METHODS``, without the seconds that takes."""


class Prepared(NamedTuple):
    """One usable row.

    :param question: the hash that decides its part.
    :param digest: the beginning of its identity.
    :param line: what is written of it.
    """

    part: Part
    question: bytes
    digest: bytes
    line: bytes


class PreparedData(NamedTuple):
    """What all data sets have become, by the spec's names.

    :param held_out: the data of the user's own that models are compared on.
    """

    sources: dict[str, PreparedSource]
    held_out: dict[str, HeldOutSource]


@dataclass
class _Written:
    """What one part of a data set has so far.

    :param rows: that were written into its file.
    :param digests: of its usable rows, also of those that were not written.
    """

    file: Path
    rows: int = 0
    digests: bytearray = field(default_factory=bytearray)

    def append(self, rows: Sequence[Prepared], max_bytes: int) -> None:
        """Write rows.

        :raises DataError: if the file is then larger than the stages may read.
        """
        self.rows += len(rows)
        if rows:
            with self.file.open("ab") as lines:
                lines.writelines(row.line for row in rows)
                _check_size(self.file.name, lines.tell(), max_bytes)


def prepare(spec: PreparationSpec) -> PreparedData:
    """Write the parts of each data set, and the digests of all that is trained on by now.

    Beside 48 bytes a row (more for one that is held out), only a block of rows is in memory.

    :raises DataError: if a data set or the digests cannot be read, more rows are bad than may be, or a file
        would be larger than the stages, or the next night, may read.
    """
    folder = spec.work_dir / DATA_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    limits = Limits(spec.max_data_bytes, folder=spec.work_dir)
    before = _trained_before(spec, limits)
    trained, prepared, held_out = before.tobytes(), {}, {}
    questions: set[bytes] = set()
    for name, source in spec.held_out.items():
        dataset = read_dataset(source.source, _tracking_uri(spec), spec.model_roots, limits)
        asked, held_out[name] = _held_out(dataset, source, spec.split, before)
        questions |= asked
    for name, source in spec.sources.items():
        dataset = read_dataset(source.source, _tracking_uri(spec), spec.model_roots, limits)
        reading = _Reading(source, spec, before, questions)
        prepared[name], digests = _prepare(dataset, reading, folder / name)
        log.info("%s: %s", name, prepared[name].model_dump_json())
        for part, count in prepared[name].kept.items():
            log.warning(
                "%s: %d rows stay out of the %s part: their questions were trained on", name, count, part
            )
        trained += digests if source.trained else b""
    digests = _as_digests(trained).tobytes()
    _check_size(DIGESTS_FILE, len(digests), spec.max_data_bytes)
    (folder / DIGESTS_FILE).write_bytes(digests)
    return PreparedData(prepared, held_out)


def _check_size(file: str, size: int, max_bytes: int) -> None:
    """Refuse what could be written and not be read again.

    :raises DataError: naming the setting.
    """
    if size > max_bytes:
        raise DataError(
            f"the prepared file {file} would have more than the {max_bytes} bytes of [post_training]"
            " max_data_bytes, under which it is read from MLflow"
        )


@dataclass(frozen=True)
class _Reading:
    """How one data set is read.

    :param before: what was trained on.
    :param questions: those that are held out.
    """

    source: PreparationSource
    spec: PreparationSpec
    before: Digests
    questions: set[bytes]

    @property
    def untrained(self) -> tuple[Part, ...]:
        """The parts whose questions must not have been trained on."""
        return ("evaluation", "validation") if self.spec.starts_from_trained else ("evaluation",)


def _held_out(
    dataset: RawDataset, source: PreparationSource, split: SplitConfig, before: Digests
) -> tuple[set[bytes], HeldOutSource]:
    """Return the questions of data that models are compared on, and what it holds.

    What cannot be read is told by the evaluation, as its own configuration says.

    :param before: what was trained on.
    """
    questions: set[bytes] = set()
    digests = bytearray()
    trained = 0
    for block in blocks(dataset):
        usable, _ = read_rows(block, source, split)
        questions.update(row.question for row in usable)
        digests += b"".join(row.digest for row in usable)
        trained += sum(_asked_before(usable, before))
    found = HeldOutSource(
        rows=len(digests) // DIGEST_BYTES, trained=trained, digest=_digest_of({"evaluation": digests})
    )
    if trained:
        log.warning("%d of %d rows of %s ask what was trained on before", trained, found.rows, dataset.source)
    return questions, found


def _asked_before(rows: Sequence[Prepared], before: Digests) -> list[bool]:
    """Say of each row whether its question was trained on, with whatever answer."""
    return [not new for new in _not_among(before, _question_digests(rows))]


def _question_digests(rows: Iterable[Prepared]) -> bytes:
    return b"".join(row.question[:DIGEST_BYTES] for row in rows)


def identity_of(conversations: Conversations, tools: Tools) -> bytes:
    """Return the SHA-256 of what a row teaches, as JSON with sorted names and without white space.

    Other columns do not change it, nor does the kind of file.

    :param conversations: one, or those of a pair.
    :param tools: that the template is given.
    """
    content = {"conversations": conversations, "tools": tools}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode()
    ).digest()


def question_of(conversation: Sequence[Message], identity: bytes) -> bytes:
    """Return the hash of a row's question, the first user message; white space does not tell two apart.

    A row that asks nothing has that of its identity.

    :param conversation: the row's; of a pair, the chosen one.
    """
    asked = next((message["content"] for message in conversation if message["role"] == "user"), "")
    question = " ".join(asked.split()).encode() or identity
    return hashlib.sha256(QUESTION_DOMAIN + question).digest()


def part_of(question: bytes, split: SplitConfig) -> Part:
    """Return the part in which a row's question lies.

    It is a hash of the question that decides: neither chance nor the row's place,
    nor its answer. So a question that was held back stays held back, whatever night, order, kind of file or
    data set it comes from, and a model is never compared on what it, or one before it, was trained to answer,
    in whatever words. A changed fraction moves only the questions at the border that it moves; those of them
    that were trained on before stay in the training part, see :func:`_stay_trained`.

    :param question: its hash.
    """
    place = (int.from_bytes(question[:8]) >> 11) / 2**53  # 53 bits: a float of all 64 could become 1
    if place < split.evaluation_fraction:
        return "evaluation"
    return "validation" if place >= 1 - split.validation_fraction else "train"


def read_rows(
    rows: Iterable[Row], source: PreparationSource, split: SplitConfig
) -> tuple[list[Prepared], dict[int, str]]:
    """Read rows as a training would, up to the model's own template and length.

    :returns: the usable ones in their order; and for the numbers of the others, why they are not.
    """
    usable: list[Prepared] = []
    bad: dict[int, str] = {}
    for row in rows:
        try:
            usable.append(_read_row(row, source, split))
        except BadRowError as reason:
            bad[row.number] = str(reason)
        except RecursionError:
            bad[row.number] = "is nested too deeply"
    return usable, bad


def _read_row(row: Row, source: PreparationSource, split: SplitConfig) -> Prepared:
    if row.error is not None:
        raise BadRowError(row.error)
    read = CONVERSATIONS[source.method](source.data_format.value, row.value)
    conversations = [[turn.message for turn in turns] for turns in read]
    identity = identity_of(conversations, tools_of(row.value))
    question = question_of(conversations[0], identity)
    return Prepared(part_of(question, split), question, identity[:DIGEST_BYTES], _line(row.value))


def _line(cells: Mapping[str, Any]) -> bytes:
    """Return a row as a line of jsonl, which the trainer reads in the row's own format."""
    filled = {column: cell for column, cell in cells.items() if cell is not None}
    try:
        return f"{json.dumps(filled, ensure_ascii=False, default=str)}\n".encode()
    except UnicodeEncodeError:  # half a character, in a column that is not trained on
        return f"{json.dumps(filled, default=str)}\n".encode()


def _prepare(dataset: RawDataset, reading: _Reading, stem: Path) -> tuple[PreparedSource, bytes]:
    """Write one data set's parts.

    :param stem: the path of its files, up to the part.
    :returns: what it has become, and the digests of what the training part teaches.
    """
    split = reading.spec.split
    written = {part: _Written(stem.with_name(f"{stem.name}.{part}.jsonl")) for part in PARTS}
    bad: dict[int, str] = {}
    kept: Counter[Part] = Counter()
    taught = bytearray()
    new_rows = held_out = 0
    for block in blocks(dataset):
        usable, bad_of_block = read_rows(block, reading.source, split)
        bad |= bad_of_block
        notice = check_bad_rows(dataset, bad, split.max_bad_row_fraction, "data.max_bad_row_fraction")
        usable, kept_of_block = _stay_trained(usable, reading)
        kept.update(kept_of_block)
        allowed = [row for row in usable if row.part == "evaluation" or row.question not in reading.questions]
        held_out += len(usable) - len(allowed)
        for part in PARTS:
            rows = [row for row in allowed if row.part == part]
            digests = b"".join(row.digest for row in rows)
            written[part].digests += digests
            if part == "train":
                taught += digests + _question_digests(rows)
                new = _not_among(reading.before, digests)
                new_rows += sum(new)
                rows = list(compress(rows, new)) if split.rows == "new" else rows
            written[part].append(rows, reading.spec.max_data_bytes)
    if notice is not None:
        log.warning(notice)
    result = PreparedSource(
        rows={part: of_part.rows for part, of_part in written.items()},
        files={part: of_part.file.name if of_part.rows else None for part, of_part in written.items()},
        new_rows=new_rows,
        skipped=len(bad),
        held_out=held_out,
        kept=dict(kept),
        digest=_digest_of({part: of_part.digests for part, of_part in written.items()}),
    )
    return result, bytes(taught)


def _stay_trained(rows: Sequence[Prepared], reading: _Reading) -> tuple[list[Prepared], list[Part]]:
    """Leave what was trained on in the training part, where a changed fraction puts it into another.

    Else a model would be compared on what it, or the one that it starts from, was trained to answer.

    :returns: the rows; and the parts from which some of them were kept.
    """
    stays = [
        asked and row.part in reading.untrained
        for row, asked in zip(rows, _asked_before(rows, reading.before), strict=True)
    ]
    settled = [row._replace(part="train") if stay else row for row, stay in zip(rows, stays, strict=True)]
    return settled, [row.part for row in compress(rows, stays)]


def _digest_of(parts: Mapping[Part, bytearray]) -> str:
    whole = hashlib.sha256()
    for part, digests in parts.items():
        whole.update(f"{part} {len(digests)}\n".encode())
        whole.update(np.sort(_array(digests)).tobytes())
    return whole.hexdigest()


def _array(digests: bytes | bytearray) -> Digests:
    return np.frombuffer(digests, dtype=f"S{DIGEST_BYTES}")


def _as_digests(digests: bytes) -> Digests:
    """Return digests ascending, none twice."""
    return np.unique(_array(digests))


def _not_among(known: Digests, digests: bytes) -> list[bool]:
    """Say of each digest whether it is new."""
    asked = _array(digests)
    if not len(known):
        return [True] * len(asked)
    places = np.searchsorted(known, asked)
    return [bool(new) for new in known.take(places, mode="clip") != asked]


def _tracking_uri(spec: PreparationSpec) -> str | None:
    return spec.tracking.tracking_uri if spec.tracking is not None else None


def _trained_before(spec: PreparationSpec, limits: Limits) -> Digests:
    """Read the digests of all that promoted runs have trained on.

    :raises DataError: if they cannot be read; its cause is an OSError where another attempt may succeed.
    """
    if spec.trained is None:
        return _as_digests(b"")
    whose = f"the digests {shown(spec.trained)} of what was trained on before"
    try:
        content = fetch(spec.trained, _tracking_uri(spec), spec.model_roots, limits)
        with content.open() as file:
            digests = file.read()
    except Exception as error:  # any file system's or MLflow's own error
        raise DataError(f"cannot read {whose}: {first_line(error)}") from error
    if len(digests) % DIGEST_BYTES:
        raise DataError(f"{whose} must have {DIGEST_BYTES} bytes each, got {len(digests)} bytes")
    return _as_digests(digests)
