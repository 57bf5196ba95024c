"""Which data sets and models a request may name, checked before anything is made.

A path must lie under an allowed root; a URI must have a known scheme and no private address.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from post_training.errors import InvalidRequestError
from post_training.schemas.requests import AnyTrainingRequest, SupervisedFineTuneRequest
from post_training.settings import Settings

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


class Resolver:
    """Turns the names in a request into absolute paths and URIs, or says why it will not.

    :param settings: allowed roots, size limits and the default model.
    :param lookup: host name -> addresses; replaced in tests.
    """

    def __init__(self, settings: Settings, lookup: Callable[[str], Iterable[str]] | None = None) -> None:
        self._settings = settings
        self._lookup = lookup or _addresses
        self._schemes: dict[str, Callable[[str, str], str]] = {
            "file": self._file_uri,
            "https": self._https,
            "data": self._data_uri,
            "huggingface": self._hub_dataset,
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
        return self.dataset("training_config.data_config.dataset_id", data.dataset_id)

    def validation_data(self, request: AnyTrainingRequest) -> str | None:
        """Return the validation data's path or URI, None where the request names none."""
        data = request.training_config.data_config
        assert data is not None, "a validated request has data_config"  # noqa: S101
        if data.validation_dataset_id is None:
            return None
        return self.dataset("training_config.data_config.validation_dataset_id", data.validation_dataset_id)

    def dataset(self, field: str, name: str) -> str:
        """Return the absolute path or the URI of a data set.

        :raises InvalidRequestError: naming ``field``.
        """
        with _readable(field, name):
            return self._dataset(field, name)

    def _dataset(self, field: str, name: str) -> str:
        scheme = _SCHEME.match(name)
        if scheme is None:
            return str(self._path(field, name, suffixes=DATA_SUFFIXES))
        if "@" in urlsplit(name).netloc:
            raise InvalidRequestError.of(field, "must not hold a user or password: the record shows it")
        check = self._schemes.get(scheme[1].lower())
        if check is None:
            raise InvalidRequestError.of(
                field, f"scheme must be one of {', '.join(sorted(self._schemes))}, got {scheme[1]!r}"
            )
        return check(field, name)

    def model(self, request: AnyTrainingRequest) -> str:
        """Return the base model's absolute path or hub id.

        :raises InvalidRequestError: naming the field.
        """
        field = "model" if isinstance(request, SupervisedFineTuneRequest) else "finetuned_model"
        name = request.model if isinstance(request, SupervisedFineTuneRequest) else request.finetuned_model
        if name is None:
            if self._settings.default_model is None:
                raise InvalidRequestError.of(
                    field, "is required: the deployment has no [post_training] default_model", "missing"
                )
            return self._settings.default_model
        if name == self._settings.default_model:
            return name
        if _SCHEME.match(name):
            raise InvalidRequestError.of(field, f"must be a path or a hub id, got {name[:200]!r}")
        if name.startswith(("/", ".", "~")) or name.endswith(".gguf"):
            with _readable(field, name):
                return str(self._path(field, name, suffixes=(".gguf",), folders=True))
        if not _HUB_ID.fullmatch(name):
            raise InvalidRequestError.of(
                field, f"must be a path or a hub id like org/name, got {name[:200]!r}"
            )
        return name

    def checkpoint_dir(self, request: SupervisedFineTuneRequest) -> Path | None:
        """Return the job's own folder for checkpoint copies, None where the request names none.

        :raises InvalidRequestError: if it does not lie under an allowed root.
        """
        if request.checkpoint_dir is None:
            return None
        with _readable("checkpoint_dir", request.checkpoint_dir):
            folder = self._under_root("checkpoint_dir", request.checkpoint_dir) / request.job_uuid
            blocked = next((path for path in (folder, *folder.parents) if path.exists()), folder)
            if not blocked.is_dir():
                raise InvalidRequestError.of("checkpoint_dir", f"must be a folder, {blocked.name!r} is none")
            return folder

    def _path(self, field: str, name: str, *, suffixes: tuple[str, ...], folders: bool = False) -> Path:
        path = self._under_root(field, name)
        if path.is_file():
            if path.suffix not in suffixes:
                raise InvalidRequestError.of(field, f"must end in {', '.join(suffixes)}, got {path.name!r}")
            return path
        if folders and (path / "config.json").is_file():
            return path
        if folders and path.is_dir():
            raise InvalidRequestError.of(field, f"{name[:200]!r} is no model folder: it has no config.json")
        raise InvalidRequestError.of(field, f"no such file: {name[:200]!r}", "not_found")

    def _under_root(self, field: str, name: str) -> Path:
        """Return the resolved path, symbolic links followed."""
        if "\0" in name or ".." in Path(name).parts:
            raise InvalidRequestError.of(field, f"must not hold '..', got {name[:200]!r}")
        roots = self._settings.allowed_roots
        options = [Path(name)] if name.startswith("/") else [root / name for root in roots]
        resolved = [option.resolve() for option in options]
        allowed = [path for path in resolved if any(path.is_relative_to(root) for root in roots)]
        if not allowed:
            raise InvalidRequestError.of(
                field,
                f"must lie under a folder of [post_training] allowed_roots, got {name[:200]!r}",
            )
        return next((path for path in allowed if path.exists()), allowed[0])

    def _file_uri(self, field: str, uri: str) -> str:
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise InvalidRequestError.of(field, f"a file URI must name this host, got {parts.netloc!r}")
        return str(self._path(field, unquote(parts.path), suffixes=DATA_SUFFIXES))

    def _https(self, field: str, uri: str) -> str:
        host = urlsplit(uri).hostname
        if not host:
            raise InvalidRequestError.of(field, f"must name a host, got {uri[:200]!r}")
        try:
            addresses = [ipaddress.ip_address(address) for address in self._lookup(host)]
        except OSError:
            raise InvalidRequestError.of(field, f"host {host!r} is unknown", "not_found") from None
        if not all(address.is_global for address in addresses):
            raise InvalidRequestError.of(field, f"must not name a private address, got host {host!r}")
        return uri

    def _data_uri(self, field: str, uri: str) -> str:
        limit = self._settings.max_data_uri_bytes
        if len(uri) > limit:
            raise InvalidRequestError.of(field, f"a data: URI may have {limit} bytes, got {len(uri)}")
        if "," not in uri:
            raise InvalidRequestError.of(field, "a data: URI needs a comma between media type and content")
        return uri

    def _hub_dataset(self, field: str, uri: str) -> str:
        parts = urlsplit(uri)
        if parts.netloc != "datasets" or not _HUB_ID.fullmatch(parts.path.removeprefix("/")):
            raise InvalidRequestError.of(
                field, f"must have the form huggingface://datasets/ORG/NAME?split=train, got {uri[:200]!r}"
            )
        return uri


@contextmanager
def _readable(field: str, name: str) -> Iterator[None]:
    """Turn what the standard library makes of a malformed name into an error of the field."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidRequestError.of(field, f"cannot be read: {error}, got {name[:200]!r}") from None


def _addresses(host: str) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
