"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lightning_modules.data.content import LazyRows, RawDataset, Row
from lightning_modules.data.parsing import BATCH_ROWS, number_rows, without_nulls
from lightning_modules.data.sources import Limits, first_line, too_large
from post_training.errors import DataError
from post_training.uris import HUB_QUERY


def read_hub(source: str, limits: Limits) -> RawDataset:
    """Read a data set of the Hugging Face hub with the datasets library, which runs no code of theirs.

    The library fetches the files of all splits of a configuration, and these together have the limit.
    """
    from datasets import load_dataset_builder  # noqa: PLC0415 - seconds, only hub data needs it
    from datasets.exceptions import DatasetGenerationError  # noqa: PLC0415
    from huggingface_hub import HfFileSystem  # noqa: PLC0415

    name, query = _hub_address(source)
    # By its bare name the library would prefer a folder in the working folder.
    builder = load_dataset_builder(
        f"hf://datasets/{name}", query.get("name"), revision=_checked_revision(source, name)
    )
    hub = HfFileSystem()
    files = [file for split in (builder.config.data_files or {}).values() for file in split]
    if sum(hub.info(file)["size"] for file in files) > limits.max_bytes:
        raise too_large(source, limits)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:  # which says no more than that there is a cause
        raise error.__cause__ or error from None
    table = builder.as_dataset(query.get("split", "train"))
    digest = hashlib.sha256()
    for batch in table.with_format("arrow").iter(BATCH_ROWS):  # raw: a decoded image has no digest
        digest.update(json.dumps(batch.to_pylist(), sort_keys=True, default=str).encode())

    def read(start: int, end: int) -> list[Row]:
        return number_rows(map(without_nulls, table.select(range(start, end))), start)

    return RawDataset(source, digest.hexdigest(), LazyRows(len(table), read))


def _checked_revision(source: str, name: str) -> str | None:
    """Return the commit that a hub data set is at, its cards checked; None where the hub is not asked.

    The library asks wherever a card says that the data files are, while it loads the card.

    :raises DataError: if that is outside the hub, or there is no such data set.
    """
    import yaml  # noqa: PLC0415 - only hub data needs them
    from huggingface_hub import DatasetCard, HfApi, hf_hub_download  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415

    readers: dict[str, Callable[[Path], Any]] = {
        "README.md": lambda card: DatasetCard.load(card).data.to_dict(),
        ".huggingface.yaml": lambda card: yaml.safe_load(card.read_bytes()),
    }
    if HF_HUB_OFFLINE:
        return None
    with _hub_errors(source):
        revision = HfApi().dataset_info(name).sha
    for file, read in readers.items():
        try:
            with _hub_errors(source):
                card = Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
        except LocalEntryNotFoundError as error:
            raise ConnectionError(first_line(error)) from error
        except EntryNotFoundError:
            continue
        for place in _places(read(card)):
            if "::" in place or place.startswith("/") or urlsplit(place).scheme not in ("", "hf"):
                raise DataError(f"the data set {source} has a card that names data outside the hub")
    return revision


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Tell what another attempt would meet too from what it may overcome.

    :raises DataError: if there is no such data set, or it is gated.
    :raises ConnectionError: if the hub does not answer; its HTTP client's own errors are no OSErrors.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError  # noqa: PLC0415

    try:
        yield
    except RepositoryNotFoundError:
        raise DataError(f"the data set {source} is not on the hub, or may not be read") from None
    except (EntryNotFoundError, OSError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(first_line(error)) from error


def _places(card: Any) -> Iterator[str]:
    """Yield each file, pattern and folder that a card names."""
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif value is not None:
        yield str(value)


def _hub_address(source: str) -> tuple[str, dict[str, str]]:
    """Return ORG/NAME and the query.

    :raises DataError: if it has another form or asks for more than split and configuration.
    """
    parts = urlsplit(source)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query, name = dict(pairs), parts.path.strip("/")
    understood = len(query) == len(pairs) and query.keys() <= set(HUB_QUERY)
    if parts.netloc != "datasets" or name.count("/") != 1 or not understood:
        raise DataError(
            f"the data set {source} must have the form huggingface://datasets/ORG/NAME?split=train&name=CONFIG"
        )
    return name, query
