"""Debian's Chromium, for the tests that look at the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

PAGE_SECONDS = 120


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start it.

    Without it the test is skipped; CI installs it.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("the machine has no chromium: apt-get install chromium")
    expect.set_options(timeout=PAGE_SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
