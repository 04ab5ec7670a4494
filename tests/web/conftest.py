"""A logged-in operator, and a real Chromium for what is interactive."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from tests.web.browser import Browser, open_browser

PASSWORD = "correct horse battery staple"


@pytest.fixture
def operator(db: None) -> Client:
    """A client that has logged in."""
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("ada", password=PASSWORD))
    return client


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for the session, on a thread of its own: its event loop must not meet Django's database."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "no Chromium on this machine; install the package chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with open_browser(program) as found:
        yield found
