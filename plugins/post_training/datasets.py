"""Which data sets and models a request may name, checked before anything is made.

A path must lie under an allowed root; a URI must have a known scheme and form, and no private address.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from post_training.addresses import is_public
from post_training.errors import InvalidRequestError
from post_training.schemas import record as names
from post_training.schemas.datasets import parse_reference
from post_training.schemas.requests import AnyTrainingRequest, SupervisedFineTuneRequest
from post_training.uris import (
    DATA_SUFFIXES,
    HUB_ID,
    MLFLOW_FORMS,
    OBJECT_STORES,
    check_by_scheme,
    check_suffix,
    hub_dataset,
    hub_model,
    mlflow_uri,
    path_of_file_uri,
    shown,
    split,
    stored_object,
)

MODEL_SUFFIXES = (".gguf",)
MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder is a model's or an adapter's if it holds one of them."""

DATA = "training_config.data_config"

PINNED = {names.TAG_TRAIN_DATA: "dataset_id", names.TAG_VALIDATION_DATA: "validation_dataset_id"}
"""Tag of a run -> field of data_config whose version it holds."""

PINNED_SCHEME = "runs:"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class Allowed(Protocol):
    """What may be named; of a deployment ``settings.Settings`` has it."""

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        """Folders below which files may be named."""

    @property
    def default_model(self) -> str | None:
        """Base model of requests that name none."""

    @property
    def max_data_uri_bytes(self) -> int:
        """Largest ``data:`` URI."""


class Resolver:
    """Turns the names in a request into absolute paths and URIs, or says why it will not.

    :param settings: allowed roots, size limits and the default model.
    :param lookup: host name -> addresses; replaced in tests.
    :param registered: a data set's id, and the start of a version's digest or None -> the URI of the version,
        or None; without it no name is taken for an id.
    """

    def __init__(
        self,
        settings: Allowed,
        lookup: Callable[[str], Iterable[str]] | None = None,
        registered: Callable[[str, str | None], str | None] | None = None,
    ) -> None:
        self._settings = settings
        self._registered = registered
        self._lookup = lookup or _addresses
        self._data_schemes: dict[str, Callable[[str, str], str]] = {
            "file": lambda field, uri: self._data_path(field, path_of_file_uri(field, uri)),
            "https": self._https,
            "data": self._data_uri,
            "huggingface": hub_dataset,
            **dict.fromkeys(OBJECT_STORES, stored_object),
            **dict.fromkeys(MLFLOW_FORMS, partial(mlflow_uri, suffixes=DATA_SUFFIXES)),
        }
        self._model_schemes: dict[str, Callable[[str, str], str]] = {
            "file": lambda field, uri: self._model_path(field, path_of_file_uri(field, uri)),
            "huggingface": hub_model,
            **dict.fromkeys(MLFLOW_FORMS, mlflow_uri),
        }

    def check(self, request: AnyTrainingRequest) -> None:
        """Resolve everything that a request names.

        :raises InvalidRequestError: naming the field and the rule.
        """
        self.train_data(request)
        self.validation_data(request)
        self.model(request)
        if isinstance(request, SupervisedFineTuneRequest):
            self.checkpoint_dir(request)

    def train_data(self, request: AnyTrainingRequest) -> str:
        """Return the training data's path or URI."""
        data = request.training_config.data_config
        assert data is not None, "a validated request has data_config"  # noqa: S101
        return self.dataset(request.place_of(f"{DATA}.dataset_id"), data.dataset_id)

    def validation_data(self, request: AnyTrainingRequest) -> str | None:
        """Return the validation data's path or URI, None where the request names none."""
        data = request.training_config.data_config
        assert data is not None, "a validated request has data_config"  # noqa: S101
        if data.validation_dataset_id is None:
            return None
        return self.dataset(request.place_of(f"{DATA}.validation_dataset_id"), data.validation_dataset_id)

    def pins(self, request: AnyTrainingRequest) -> dict[str, str]:
        """Return the versions that a job reads from here on, as tags of its run: of data sets whose rows are
        registered, and may be registered anew before the job has ended.

        :raises InvalidRequestError: naming the field.
        :raises RecordUnavailableError: if the registered data sets cannot be asked for.
        """
        data = request.training_config.data_config
        assert data is not None, "a validated request has data_config"  # noqa: S101
        pinned: dict[str, str] = {}
        for tag, field in PINNED.items():
            name = getattr(data, field)
            if name is not None and not _SCHEME.match(name) and parse_reference(name) is not None:
                uri = self.dataset(request.place_of(f"{DATA}.{field}"), name)
                pinned |= {tag: uri} if uri.startswith(PINNED_SCHEME) else {}
        return pinned

    def checked_pins(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Return the versions that a run's tags hold: whoever writes to MLflow may have written them.

        :raises InvalidRequestError: naming the tag.
        """
        pinned = {tag: tags[tag] for tag in PINNED if tags.get(tag, "").startswith(PINNED_SCHEME)}
        return {tag: self.dataset_uri(tag, uri) for tag, uri in pinned.items()}

    def dataset(self, field: str, name: str) -> str:
        """Return the absolute path or the URI of a data set, its scheme in lower case.

        :param name: a path, a URI, or a registered data set's ``ID`` or ``ID@DIGEST``.
        :raises InvalidRequestError: naming ``field``.
        :raises RecordUnavailableError: if the registered data sets cannot be asked for.
        """
        if _SCHEME.match(name):
            return self.dataset_uri(field, name)
        reference = parse_reference(name)
        if reference is None or self._registered is None:
            with _readable(field, name):
                return self._data_path(field, name)
        uri = self._registered(*reference)
        if uri is None:
            raise InvalidRequestError.of(
                field,
                f"no data set {name!r} is registered, and a path ends in {', '.join(DATA_SUFFIXES)}",
                "not_found",
            )
        return self.dataset_uri(field, uri)

    def dataset_uri(self, field: str, uri: str) -> str:
        """Return the absolute path or the URI of a data set that is named by a URI.

        :raises InvalidRequestError: naming ``field``.
        """
        with _readable(field, uri):
            if (scheme := _SCHEME.match(uri)) is None:
                raise InvalidRequestError.of(field, f"must be a URI, got {shown(uri)!r}")
            return check_by_scheme(self._data_schemes, scheme[1], field, uri)

    def model(self, request: AnyTrainingRequest) -> str:
        """Return the absolute path, the hub id or the MLflow URI of the model to start from.

        :raises InvalidRequestError: naming the field.
        """
        supervised = isinstance(request, SupervisedFineTuneRequest)
        field = "model" if supervised else "finetuned_model"
        return self.model_named(request.place_of(field), getattr(request, field))

    def model_named(self, field: str, name: str | None) -> str:
        """Return the absolute path, the hub id or the MLflow URI of a model.

        :param name: None is the deployment's default.
        :raises InvalidRequestError: naming ``field``.
        """
        name = name or self._settings.default_model
        if name is None:
            raise InvalidRequestError.of(
                field, "is required: the deployment has no [post_training] default_model", "missing"
            )
        with _readable(field, name):
            return self._model(field, name)

    def _model(self, field: str, name: str) -> str:
        if (scheme := _SCHEME.match(name)) is not None:
            return check_by_scheme(self._model_schemes, scheme[1], field, name)
        if name == self._settings.default_model:  # where it lies is the deployment's own choice
            return name
        if name.startswith(("/", ".", "~")) or name.endswith(MODEL_SUFFIXES):
            return self._model_path(field, name)
        if not HUB_ID.fullmatch(name):
            raise InvalidRequestError.of(
                field, f"must be a path, a hub id like org/name, or a URI, got {shown(name)!r}"
            )
        return name

    def model_roots(self) -> tuple[Path, ...]:
        """Return where the base model that an adapter names may lie: also where the default model is."""
        roots, default = self._settings.allowed_roots, self._settings.default_model
        return (*roots, Path(default).resolve()) if default and default.startswith("/") else roots

    def checkpoint_dir(self, request: SupervisedFineTuneRequest) -> Path | None:
        """Return the job's own folder for checkpoint copies, None where the request names none.

        :raises InvalidRequestError: if it does not lie under an allowed root.
        """
        if request.checkpoint_dir is None:
            return None
        with _readable("checkpoint_dir", request.checkpoint_dir):
            parent = self._under_root("checkpoint_dir", request.checkpoint_dir)
            folder = self._under_root("checkpoint_dir", str(parent / request.job_uuid))
            blocked = next((path for path in (folder, *folder.parents) if path.exists()), folder)
            if not blocked.is_dir():
                raise InvalidRequestError.of("checkpoint_dir", f"must be a folder, {blocked.name!r} is none")
            return folder

    def _data_path(self, field: str, name: str) -> str:
        path = self._under_root(field, name)
        if path.is_file():
            check_suffix(field, path.name, DATA_SUFFIXES)
            return str(path)
        raise InvalidRequestError.of(field, f"no such file: {shown(name)!r}", "not_found")

    def _model_path(self, field: str, name: str) -> str:
        path = self._under_root(field, name)
        if path.is_file():
            check_suffix(field, path.name, MODEL_SUFFIXES)
            return str(path)
        if not path.is_dir():
            raise InvalidRequestError.of(field, f"no such file or folder: {shown(name)!r}", "not_found")
        if not any((path / file).is_file() for file in MODEL_FILES):
            raise InvalidRequestError.of(
                field, f"{shown(name)!r} is no model folder: it has no {' and no '.join(MODEL_FILES)}"
            )
        return str(path)

    def _under_root(self, field: str, name: str) -> Path:
        """Return the resolved path, symbolic links followed."""
        if "\0" in name or ".." in Path(name).parts:
            raise InvalidRequestError.of(field, f"must not hold '..', got {shown(name)!r}")
        roots = self._settings.allowed_roots
        options = [Path(name)] if name.startswith("/") else [root / name for root in roots]
        resolved = [option.resolve() for option in options]
        allowed = [path for path in resolved if any(path.is_relative_to(root) for root in roots)]
        if not allowed:
            raise InvalidRequestError.of(
                field,
                f"must lie under a folder of [post_training] allowed_roots, got {shown(name)!r}",
            )
        return next((path for path in allowed if path.exists()), allowed[0])

    def _https(self, field: str, uri: str) -> str:
        parts = split(field, uri, query=True)  # of a signed URL
        if not parts.hostname or parts.port == 0:
            raise InvalidRequestError.of(field, f"must name a host, got {shown(uri)!r}")
        if not uri.isascii() or " " in uri:
            raise InvalidRequestError.of(field, f"must be percent-encoded, got {shown(uri)!r}")
        check_suffix(field, parts.path, DATA_SUFFIXES)
        try:
            addresses = list(self._lookup(parts.hostname))
        except OSError:
            raise InvalidRequestError.of(field, f"host {parts.hostname!r} is unknown", "not_found") from None
        if not all(map(is_public, addresses)):
            raise InvalidRequestError.of(
                field, f"must not name a private address, got host {parts.hostname!r}"
            )
        return uri

    def _data_uri(self, field: str, uri: str) -> str:
        limit = self._settings.max_data_uri_bytes
        if len(uri) > limit:
            raise InvalidRequestError.of(field, f"a data: URI may have {limit} bytes, got {len(uri)}")
        if "," not in uri:
            raise InvalidRequestError.of(field, "a data: URI needs a comma between media type and content")
        return uri


@contextmanager
def _readable(field: str, name: str) -> Iterator[None]:
    """Turn what the standard library makes of a malformed name into an error of the field."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before 3.13
        said = (error.strerror or "") if isinstance(error, OSError) else str(error)
        reason = re.sub(r"(['\"]).*\1", "…", said, flags=re.DOTALL)  # the name, which may hold a secret
        raise InvalidRequestError.of(field, f"cannot be read: {reason}, got {shown(name)!r}") from None


def _addresses(host: str) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
