"""What a caller registers as a data set, and what the service says of it."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from post_training.schemas.base import LenientModel, StrictModel, check_text
from post_training.uris import DATA_SUFFIXES

MAX_ID_LENGTH = 200
MAX_METADATA_LENGTH = 5_000
"""Characters of its JSON; MLflow cuts longer tags in silence."""
MAX_DEPTH = 64
"""Lists and objects within one another; what is nested hundreds deep can be read but not always written."""

_ENDINGS = "|".join(map(re.escape, DATA_SUFFIXES))
_ID = rf"(?!.*({_ENDINGS})$)[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_ID_LENGTH - 1}}}"
_REFERENCE = re.compile(r"([A-Za-z0-9._-]+)(?:@([0-9a-f]{8,64}))?")

DatasetPurpose = Literal["post-training/messages", "eval/question-answer", "eval/messages-answer"]
SourceType = Literal["uri", "rows"]


def check_dataset_id(value: str) -> str:
    """Return the id if it can be taken for no path, which ends in a data file's suffix, and for no URI.

    :raises PydanticCustomError: naming the rule that is broken.
    """
    if not re.fullmatch(_ID, value):
        raise PydanticCustomError(
            "dataset_id",
            "dataset_id must have 1 to {length} letters, digits and . _ -, a letter or digit first, and not"
            " end in {suffixes}",
            {"length": MAX_ID_LENGTH, "suffixes": ", ".join(DATA_SUFFIXES)},
        )
    return value


def asset_uri(dataset_id: str) -> str:
    """Return the URI of the Airflow asset that each new version of a registered data set updates."""
    return f"x-post-training://datasets/{dataset_id}"


def parse_reference(name: str) -> tuple[str, str | None] | None:
    """Read ``ID`` or ``ID@DIGEST``, as a training request names a registered data set.

    :returns: the id and the first 8 or more hexadecimal digits of the version's digest, None for the
        current version; None if the name is neither.
    """
    parts = _REFERENCE.fullmatch(name)
    if parts is None or not re.fullmatch(_ID, parts[1]):
        return None
    return parts[1], parts[2]


def check_json(value: Any) -> Any:
    """Refuse NaN and infinities, which JSON cannot say, deep nesting, and what no file or database can hold.

    :raises PydanticCustomError: if there is one.
    """
    depth = _depth(value)
    if depth > MAX_DEPTH:
        raise PydanticCustomError(
            "json_value",
            "may be nested {limit} levels deep, got {depth}",
            {"limit": MAX_DEPTH, "depth": depth},
        )
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise PydanticCustomError("json_value", "must be JSON: {reason}", {"reason": str(error)}) from None
    return check_text(value)


def _depth(value: Any) -> int:
    """Return how many lists and objects lie within one another; level by level, for recursion has an end."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    length = len(json.dumps(value))
    if length > MAX_METADATA_LENGTH:
        raise PydanticCustomError(
            "too_long",
            "may have {limit} characters as JSON, got {length}",
            {"limit": MAX_METADATA_LENGTH, "length": length},
        )
    return value


DatasetId = Annotated[
    str,
    AfterValidator(check_dataset_id),
    WithJsonSchema({"type": "string", "maxLength": MAX_ID_LENGTH, "pattern": f"^{_ID}$"}),
]
Metadata = Annotated[dict[str, Any], AfterValidator(check_json), AfterValidator(_check_metadata)]


def _only(kind: str, other: str) -> dict[str, Any]:
    given = {"type": {"enum": [kind, None]}, kind: {"not": {"type": "null"}}, other: {"type": "null"}}
    return {"required": [kind], "properties": given}


class DatasetSource(StrictModel):
    """Where the rows are: at a URI, or in the request itself."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_only("uri", "rows"), _only("rows", "uri")]})

    type: SourceType | None = Field(
        default=None, description="uri or rows; some clients leave it out: it is the field that is given."
    )
    uri: Annotated[str, Field(min_length=1), AfterValidator(check_text)] | None = Field(
        default=None, description="Any URI that a training request may name."
    )
    rows: Annotated[list[dict[str, Any]], Field(min_length=1), AfterValidator(check_json)] | None = Field(
        default=None, description="The rows themselves."
    )

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Self:
        given = [kind for kind in ("uri", "rows") if getattr(self, kind) is not None]
        if len(given) != 1 or self.type not in (None, given[0]):
            raise PydanticCustomError(
                "dataset_source", "must hold uri or rows, one of them, and type must be its name or absent"
            )
        return self


class RegisterDatasetRequest(StrictModel):
    """Body of the registration of a data set, or of another version of one."""

    purpose: DatasetPurpose = Field(description="What the rows are for, in the published client's words.")
    source: DatasetSource = Field(description="Where the rows are.")
    dataset_id: DatasetId | None = Field(
        default=None, description="Name of the data set; null names it by its content."
    )
    metadata: Metadata | None = Field(default=None, description="What the caller wants to keep beside it.")


class StoredSource(LenientModel):
    """Where the rows of a version are."""

    type: SourceType = Field(description="How they were registered.")
    uri: str = Field(
        description="What a trainer reads; for what was sent as rows or data: it is in MLflow. An https URL"
        " is shown without its query, which may be a signature."
    )
    rows: list[dict[str, Any]] | None = Field(
        default=None, description="The rows that were registered; null in a list, and for a URI."
    )


class Dataset(LenientModel):
    """The current version of a data set, or the one that was asked for."""

    identifier: str = Field(description="Its id.")
    provider_id: str = Field(default="mlflow", description="What keeps it.")
    provider_resource_id: str = Field(description="The version's run in MLflow.")
    type: Literal["dataset"] = Field(default="dataset", description="What it is, to the published client.")
    purpose: DatasetPurpose = Field(description="What the rows are for.")
    source: StoredSource = Field(description="Where the rows are.")
    metadata: dict[str, Any] = Field(description="What was kept beside it.")
    version: str = Field(
        description="SHA-256 of the rows' file, or of the URI; ID@VERSION, or its first 8 digits, names it."
    )
    created_at: datetime = Field(description="When the version was registered (UTC).")


class ListDatasetsResponse(LenientModel):
    """All data sets in their current versions, the newest first."""

    data: list[Dataset]
