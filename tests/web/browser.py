"""Drives Chromium through Playwright from a thread of its own.

Playwright's synchronous interface runs an event loop on the calling thread, where Django then refuses the database. So
every step with a page is a function that runs on the browser's thread, while tests change rows on theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import BrowserContext, Page, sync_playwright

T = TypeVar("T")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE_MS = 20_000


@dataclass(frozen=True)
class Session:
    """Somebody who has logged in to the console at this address."""

    url: str
    key: str


@dataclass
class Visit:
    """One browser window. Collects what a page must not do: console errors, and requests to foreign hosts."""

    run: Callable[[Callable[[], Any]], Any]
    page: Page
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def do(self, step: Callable[[Page], T]) -> T:
        """Run one step on the browser's thread."""
        found: T = self.run(lambda: step(self.page))
        return found


class Browser:
    """Opens windows in one running Chromium."""

    def __init__(self, thread: ThreadPoolExecutor, chromium: Chromium) -> None:
        self._thread = thread
        self._chromium = chromium

    def run(self, step: Callable[[], T]) -> T:
        """Run something on the browser's thread."""
        return self._thread.submit(step).result()

    @contextmanager
    def visit(
        self,
        *,
        width: int = 1440,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        session: Session | None = None,
    ) -> Iterator[Visit]:
        """A fresh window: a stranger's, or one of the session given."""

        def begin() -> tuple[BrowserContext, Visit]:
            context = self._chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            context.set_default_timeout(PATIENCE_MS)
            if session:
                context.add_cookies([{"name": "sessionid", "value": session.key, "url": session.url}])
            visit = Visit(self.run, context.new_page())
            visit.page.on("console", lambda said: visit.errors.append(said.text) if said.type == "error" else None)
            visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
            visit.page.on("request", lambda request: visit.urls.append(request.url))
            return context, visit

        context, visit = self.run(begin)
        try:
            yield visit
        finally:
            self.run(context.close)


def log_in(page: Page, url: str, name: str, password: str) -> None:
    """Fill in the form of the log-in page and wait for the page behind it."""
    page.goto(f"{url}/login/")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Fleet").wait_for()


@contextmanager
def open_browser(program: str) -> Iterator[Browser]:
    """A Chromium without network services of its own."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="browser") as thread:
        playwright = thread.submit(lambda: sync_playwright().start()).result()
        chromium = thread.submit(
            lambda: playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        ).result()
        try:
            yield Browser(thread, chromium)
        finally:
            thread.submit(chromium.close).result()
            thread.submit(playwright.stop).result()
