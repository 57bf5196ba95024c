"""The content of a data set's file, wherever it lies."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from lightning_modules.data.content import Content
from lightning_modules.mlflow_uris import LOOKUPS, resolve
from post_training.addresses import is_public
from post_training.errors import DataError
from post_training.places import lies_under, may_be_used
from post_training.uris import without_secrets

LOCAL_SCHEMES = ("", "file")
"""Of what lies on this machine."""

TIMEOUT_SECONDS = 60.0
"""How long an https server may be silent."""

USER_AGENT = "airflow-provider-post-training"

MISSING_ARTIFACT = re.compile(r"404 Client Error|\(404\)|No such file")
"""What MLflow's one error for every failed download says of a file that is not there."""

MAX_REASON = 300
"""Characters of another library's error that are passed on; some list every suffix they know."""

PASSING_STATUS = (408, 429)
"""Answers of the 4xx kind that another attempt may not meet."""


CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Limits:
    """What may be fetched from outside.

    :param max_bytes: largest file, of parquet also the most bytes that it unpacks to and the most rows;
        files on this machine have no limit.
    :param may_be_reached: whether an https server may have this address.
    :param folder: where what is fetched lies while it is read, without a name; None is the system's.
    """

    max_bytes: int = 4 * 2**30
    may_be_reached: Callable[[str], bool] = is_public
    folder: Path | None = None


DEFAULT_LIMITS = Limits()


def fetch(source: str, tracking_uri: str | None, roots: Sequence[Path], limits: Limits) -> Content:
    """Open a file, one from elsewhere once it is here.

    :param source: an absolute path; or a URI of scheme ``file``, ``https``, ``runs``, ``models``,
        ``mlflow-artifacts``, or any that fsspec knows (``s3``, ``gs``, ``abfs``, …).
    :param tracking_uri: of the MLflow server whose artifacts the three schemes mean.
    :param roots: where on this machine a file may lie, whether named by its path or by that server; none is
        everywhere for a path, and nowhere for the server.
    :raises DataError: if there is no such file, it is larger than the limit, or it may not be read so.
    :raises OSError: if it cannot be reached, which another attempt may not meet.
    :raises ImportError: naming the package that a scheme needs.
    """
    parts = urlsplit(source)
    if parts.scheme in LOCAL_SCHEMES:
        return _open_path(unquote(parts.path) if parts.scheme else source, roots)
    if parts.scheme in LOOKUPS:
        return _fetch_artifact(source, tracking_uri, roots, limits)
    return (_fetch_https if parts.scheme == "https" else _fetch_object)(source, limits)


def shown(source: str) -> str:
    """Leave out what may hold rows or a secret: the body of a data: URI, a query, a password."""
    return source.partition(",")[0] if source.lower().startswith("data:") else without_secrets(source)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, not all of a long one; its class if it says nothing."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} …"


def too_large(source: str, limits: Limits) -> DataError:
    """Return the error of what has more bytes than may be fetched."""
    return DataError(f"the data set {shown(source)} is larger than the limit of {limits.max_bytes} bytes")


def _missing(source: str) -> DataError:
    return DataError(f"the data set {shown(source)} does not exist")


def _keep(source: str, stream: HTTPResponse | BinaryIO, limits: Limits) -> Content:
    """Copy to the end, in pieces, unless they are too many."""

    def pieces() -> Iterator[bytes]:
        size = 0
        while piece := stream.read(CHUNK_BYTES):
            size += len(piece)
            if size > limits.max_bytes:
                raise too_large(source, limits)
            yield piece

    return Content.of_parts(pieces(), limits.folder)


def _open_path(path: str, roots: Sequence[Path]) -> Content:
    """Check a file by its open descriptor: a link may have taken its place since the path was checked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"the data set {path} is a folder, not a file")
        if not stat.S_ISREG(mode):
            raise _missing(path)
        if roots and not lies_under(_place_of(descriptor, path), roots):
            raise DataError(f"the data set {path} lies under no folder of allowed_roots")
        return Content(os.dup(descriptor))
    finally:
        os.close(descriptor)


def _place_of(descriptor: int, path: str) -> str:
    """Return where an open file lies; without /proc, where its path leads to by now."""
    link = f"/proc/self/fd/{descriptor}"
    return os.readlink(link) if os.path.islink(link) else os.path.realpath(path)


class _NoRedirects(HTTPRedirectHandler):
    """Takes a redirect for an error: it could lead to an address that the request may not name."""

    def redirect_request(self, *args: object) -> None:
        """Make no request."""


class _Checked(HTTPConnection):
    """Asks whether the address that it has reached may be reached, before TLS sends anything to it.

    Behind a proxy it is the proxy that looks the host up, and that decides.
    """

    may_be_reached: Callable[[str], bool]
    has_proxy = False

    def connect(self) -> None:
        """Connect by TCP."""
        super().connect()
        address = self.sock.getpeername()[0]
        if not self.has_proxy and not self.may_be_reached(address):
            raise DataError(f"the host {self.host} leads to the private address {address}")


class _CheckedHTTPS(HTTPSConnection, _Checked):
    def __init__(self, *args: Any, may_be_reached: Callable[[str], bool], **options: Any) -> None:
        super().__init__(*args, **options)
        self.may_be_reached = may_be_reached

    def set_tunnel(self, *args: Any, **options: Any) -> None:
        """Go through a proxy."""
        super().set_tunnel(*args, **options)
        self.has_proxy = True


class _HTTPS(HTTPSHandler):
    def __init__(self, may_be_reached: Callable[[str], bool]) -> None:
        super().__init__()
        self._connect = partial(_CheckedHTTPS, may_be_reached=may_be_reached)

    def https_open(self, request: Request) -> HTTPResponse:
        """Send the request over a checked connection."""
        return self.do_open(self._connect, request)


def _fetch_https(source: str, limits: Limits) -> Content:
    request = Request(source, headers={"User-Agent": USER_AGENT})  # noqa: S310 - the scheme is known
    opener = build_opener(_NoRedirects, _HTTPS(limits.may_be_reached))
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            content = _keep(source, response, limits)
            if response.length:  # read in pieces, an answer that breaks off ends like a whole one
                raise IncompleteRead(b"", response.length)
            return content
    except HTTPError as error:
        error.close()
        if error.code == 404:
            raise _missing(source) from None
        if error.code < 500 and error.code not in PASSING_STATUS:
            rule = ", and redirects are not followed" if error.code < 400 else ""
            raise DataError(
                f"cannot read the data set {shown(source)}: the server answers {error.code}{rule}"
            ) from None
        raise
    except HTTPException as error:  # the answer broke off
        raise ConnectionError(first_line(error)) from error


def _fetch_object(source: str, limits: Limits) -> Content:
    import fsspec  # noqa: PLC0415 - only remote data needs it

    if "::" in source:  # fsspec would read it as one address inside another, a local one as well
        raise DataError(f"the data set {shown(source)} must not be a chain of addresses ('::')")
    # fsspec hears of this scheme from the package alone, and could not say which one is missing.
    fsspec.register_implementation(
        "abfss", "adlfs.AzureBlobFileSystem", errtxt="Install adlfs to access Azure"
    )
    filesystem, path = fsspec.url_to_fs(source)
    try:
        with filesystem.open(path, "rb") as file:
            return _keep(source, file, limits)
    except FileNotFoundError:
        raise _missing(source) from None
    except (OSError, DataError):
        raise
    except Exception as error:  # each store has its own for a server that does not answer
        raise ConnectionError(first_line(error)) from error


def _fetch_artifact(source: str, tracking_uri: str | None, roots: Sequence[Path], limits: Limits) -> Content:
    """Download from the store that the job's own tracking server names."""
    if tracking_uri is None:
        raise DataError(f"the data set {source} lies on an MLflow server, and this job has none")
    from mlflow import MlflowClient  # noqa: PLC0415 - seconds, only artifacts need it
    from mlflow.artifacts import download_artifacts  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    parts = urlsplit(source)
    if parts.netloc or ".." in unquote(parts.path).split("/"):
        raise DataError(f"the data set {shown(source)} must be {parts.scheme}:/PATH, without a host or '..'")
    try:
        _, location = resolve(MlflowClient(tracking_uri, registry_uri=tracking_uri), source)
        if not may_be_used(location, roots):
            raise DataError(
                f"MLflow keeps the data set {source} in {location}, under no folder of allowed_roots"
            )
        _check_artifact(source, location, tracking_uri, limits)
        with TemporaryDirectory(dir=limits.folder) as folder:
            file = download_artifacts(
                location, dst_path=folder, tracking_uri=tracking_uri, registry_uri=tracking_uri
            )
            with Path(file).open("rb") as stream:
                if os.fstat(stream.fileno()).st_size > limits.max_bytes:
                    raise too_large(source, limits)
                return Content.of(stream)
    except MlflowException as error:
        if MISSING_ARTIFACT.search(str(error)):
            raise _missing(source) from None
        if error.get_http_status_code() >= 500:  # type: ignore[no-untyped-call]
            raise ConnectionError(first_line(error)) from error
        raise


def _check_artifact(source: str, location: str, tracking_uri: str, limits: Limits) -> None:
    """Refuse a folder, and a file over the limit, before any of it is downloaded.

    :raises DataError: naming the rule; what the store does not list is left to the download.
    """
    from mlflow.store.artifact.artifact_repository_registry import (  # noqa: PLC0415
        get_artifact_repository,
    )

    parent, _, name = location.rstrip("/").rpartition("/")
    for entry in get_artifact_repository(parent, tracking_uri=tracking_uri).list_artifacts():
        if entry.path.rpartition("/")[2] != name:
            continue
        if entry.is_dir:
            raise DataError(f"the data set {shown(source)} is a folder, not a file")
        if (entry.file_size or 0) > limits.max_bytes:
            raise too_large(source, limits)
