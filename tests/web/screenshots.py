"""Takes pictures of every console page with the rows of demo_rows: ``python -m tests.web.screenshots FOLDER``."""

# ruff: noqa: E402, T201 - Django must be set up before its models are imported, and a script may print

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django.contrib.auth import get_user_model
from django.contrib.staticfiles.testing import StaticLiveServerTestCase
from django.test.utils import setup_databases, setup_test_environment, teardown_databases
from django.utils import timezone
from playwright.sync_api import Page

from qoe_service.decisions.models import Decision
from tests.web.browser import Browser, log_in, open_browser
from tests.web.demo_rows import seed_fleet

PASSWORD = "a picture needs no secrets"
SIZES = ((1440, 900), (390, 844))
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def main(folder: Path) -> None:
    """Build rows in a test database, serve them, and take the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    setup_test_environment()
    databases = setup_databases(verbosity=0, interactive=False)
    StaticLiveServerTestCase.setUpClass()
    try:
        get_user_model().objects.create_superuser("operator", password=PASSWORD)
        seed_fleet(now=timezone.now(), leases=60)
        with open_browser(shutil.which("chromium") or "chromium") as browser:
            take(browser, StaticLiveServerTestCase.live_server_url, folder)
    finally:
        StaticLiveServerTestCase.tearDownClass()
        teardown_databases(databases, verbosity=0)


def pages() -> dict[str, str]:
    """The path of every page by the name of its picture."""
    joined = Decision.objects.filter(device="d-phone", kind="exploit", state="joined").order_by("-decided_at")
    return {
        "fleet": "/",
        "device": "/devices/d-sensor-hub/",
        "application": "/applications/digits/",
        "catalogue": "/applications/digits/catalogue/?class=tablet",
        "decision": f"/decisions/{joined[0].pk}/",
        "narrowed": "/?class=phone",
        "missing": "/devices/nobody/",
    }


def take(browser: Browser, url: str, folder: Path) -> None:
    """One picture of each page in each size and scheme."""
    paths = pages()
    for (width, height), scheme in ((size, scheme) for size in SIZES for scheme in SCHEMES):
        suffix = f"{width}-{scheme}"

        def take_all(page: Page, suffix: str = suffix) -> None:
            page.goto(f"{url}/login/")
            page.screenshot(path=folder / f"login-{suffix}.png")
            log_in(page, url, "operator", PASSWORD)
            for name, path in paths.items():
                page.goto(url + path)
                page.wait_for_timeout(1000)
                page.screenshot(path=folder / f"{name}-{suffix}.png", full_page="--whole" in sys.argv)

        with browser.visit(width=width, height=height, scheme=scheme) as visit:
            visit.do(take_all)
        print(suffix, visit.errors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
