"""A real browser, logged in to Airflow, that notes what goes wrong in our page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page

from tests.chromium import PAGE_SECONDS, chromium
from tests.system.conftest import Deployment

WIDE, NARROW = (1400, 900), (390, 844)


class Visits:
    """Pages of the deployment as its users see them.

    :param browser: the browser.
    """

    def __init__(self, browser: Browser, deployment: Deployment) -> None:
        self._browser = browser
        self._deployment = deployment
        self.problems: list[str] = []

    @contextmanager
    def page(
        self, user: str = "admin", *, theme: str = "light", size: tuple[int, int] = WIDE
    ) -> Iterator[Page]:
        """Open an empty page of a user who is logged in; none is with an empty name."""
        width, height = size
        context = self._browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(PAGE_SECONDS * 1000)
        context.add_init_script(f"localStorage.setItem('theme', {theme!r})")
        if user:
            token = self._deployment.servers.token(user)
            context.add_cookies(
                [{"name": "_token", "value": token, "url": self._deployment.servers.airflow_url}]
            )
        page = context.new_page()
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        try:
            yield page
        finally:
            context.close()

    def url(self, path: str = "") -> str:
        """Return the address of one of the page's documents, without Airflow around it."""
        return f"{self._deployment.servers.service_url}/ui/{path}"

    def _note(self, message: ConsoleMessage) -> None:
        place: Any = message.location
        if message.type == "error" and "/post-training/" in place.get("url", ""):
            self.problems.append(f"{message.text} ({place['url']})")


@contextmanager
def visiting(deployment: Deployment) -> Iterator[Visits]:
    """Start a browser."""
    with chromium() as browser:
        yield Visits(browser, deployment)
