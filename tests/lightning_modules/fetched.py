"""What the tests of fetched data share: a file, and how a failure is told."""

from __future__ import annotations

import pytest

from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits
from lightning_modules.process import is_permanent
from post_training.errors import DataError

JSONL = b'{"question": "2+2?", "answer": "4"}\n'
ROW = {"question": "2+2?", "answer": "4"}


ANYWHERE = Limits(may_be_reached=lambda address: True)


def failure(source: str, tracking_uri: str | None = None, limits: Limits = ANYWHERE) -> tuple[str, bool]:
    """What reading a source says, in one sentence, and whether another attempt would say the same."""
    with pytest.raises(DataError) as caught:
        read_dataset(source, tracking_uri, limits=limits)
    assert "\n" not in str(caught.value)
    return str(caught.value), is_permanent(caught.value)
