"""What all pages share: formatting, static files, security headers, error pages, log-in and log-out."""

from __future__ import annotations

import doctest
import re
from datetime import timedelta
from pathlib import Path

import pytest
from django.contrib.auth import get_user_model
from django.contrib.staticfiles import finders
from django.test import Client
from django.utils import timezone

from tests import builders
from web import formatting, urls
from web.finders import PlotlyFinder
from web.templatetags.console import ago

ROOT = Path(__file__).resolve().parents[2]


def test_numbers_read_as_documented() -> None:
    outcome = doctest.testmod(formatting)
    assert outcome.attempted >= 9
    assert outcome.failed == 0


@pytest.mark.parametrize(
    ("offset_s", "words"), [(0.4, "just now"), (61, "61 s ago"), (7199, "119 min ago"), (-30, "in 30 s")]
)
def test_ages_are_words_with_the_moment_as_title(offset_s: float, words: str) -> None:
    now = timezone.now()
    tag = ago(now - timedelta(seconds=offset_s), now)
    assert f">{words}</time>" in tag
    assert 'UTC"' in tag


def test_plotly_comes_from_its_package_and_nothing_else_of_it_does() -> None:
    found = finders.find("plotly/plotly.min.js")
    assert isinstance(found, str)
    assert "site-packages" in found
    assert finders.find("plotly/package_data/plotly.min.js") is None
    assert [path for path, _ in PlotlyFinder().list(None)] == ["plotly.min.js"]


def test_nothing_of_others_lives_in_the_console() -> None:
    scripts = sorted(path.name for path in (ROOT / "web").rglob("*.js"))
    assert scripts == ["charts.js", "console.js", "theme.js", "upload.js"]
    templates = "".join(path.read_text() for path in (ROOT / "web/templates").rglob("*.html"))
    assert "https://" not in templates
    assert "<script>" not in templates
    assert ' style="' not in templates
    assert "onclick" not in templates


def test_every_route_of_the_console_is_documented() -> None:
    documented = (ROOT / "docs/console.md").read_text()
    routes = [f"/{each.pattern}".replace("<str:", "{").replace(">", "}") for each in urls.urlpatterns]
    assert len(routes) >= 9
    assert [route for route in routes if f"`{route}`" not in documented] == []


@pytest.mark.django_db
def test_pages_forbid_foreign_code_frames_and_stale_copies(operator: Client) -> None:
    builders.make_device()
    for path in ("/", "/devices/d-kitchen-tablet/", "/login/"):
        headers = (Client() if path == "/login/" else operator).get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "no-cache" in headers["Cache-Control"]
        assert "HX-Request" in headers["Vary"]


@pytest.mark.django_db
def test_every_page_of_the_console_needs_a_log_in(operator: Client) -> None:
    application = builders.make_application()
    device = builders.make_device()
    decision = builders.make_decision(device, application, builders.make_variant(application))
    paths = [
        *("/", f"/devices/{device.pk}/", f"/decisions/{decision.pk}/", "/applications/digits/"),
        "/applications/digits/catalogue.json",
        *("/applications/digits/verdict/", "/applications/digits/qoe.json", "/applications/digits/qoe/"),
    ]
    for path in paths:
        assert operator.get(path).status_code == 200, path
        assert Client().get(path).headers["Location"].startswith("/login/"), path
        assert operator.post(path).status_code == 405, path
    catalogue = "/applications/digits/catalogue/"  # whose buttons post
    assert operator.get(catalogue).status_code == 200
    for answer in (Client().get(catalogue), Client().post(catalogue, {"do": "retire:digits-small"})):
        assert answer.headers["Location"].startswith("/login/")
    assert application.variants.get().retired_at is None


@pytest.mark.django_db
def test_log_in_leads_nowhere_but_to_our_own_pages() -> None:
    get_user_model().objects.create_user("ada", password="secret")
    answer = Client().post("/login/?next=https://evil.example/", {"username": "ada", "password": "secret"})
    assert answer.headers["Location"] == "/"


@pytest.mark.django_db
def test_log_out_ends_the_session_and_only_by_post(operator: Client) -> None:
    assert operator.get("/logout/").status_code == 405
    assert operator.post("/logout/").headers["Location"] == "/login/"
    assert operator.get("/").status_code == 302


@pytest.mark.django_db
def test_a_form_without_its_token_gets_a_styled_refusal() -> None:
    answer = Client(enforce_csrf_checks=True).post("/login/", {"username": "ada", "password": "x"})
    assert answer.status_code == 403
    assert b"Not for you" in answer.content
    assert b"tokens.css" in answer.content


@pytest.mark.django_db
def test_a_mistake_of_ours_gets_a_styled_page_without_details(operator: Client) -> None:
    builders.make_device(labels=["labels are never a list"])
    operator.raise_request_exception = False
    answer = operator.get("/")
    assert answer.status_code == 500
    assert b"Something broke" in answer.content
    assert b"has no attribute" not in answer.content


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, by WCAG 2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, by WCAG 2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_text_colour_stands_out_from_every_ground_it_is_used_on(mode: int) -> None:
    tokens = (ROOT / "web/static/web/tokens.css").read_text()
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", tokens)
    colours = {name: values[mode] for name, *values in pairs}
    grounds = ("bg", "surface", "sunken")
    used = [(ink, ground) for ink in ("ink", "ink-muted", "ink-faint", "accent", "bad") for ground in grounds]
    used += [(name, f"{name}-soft") for name in ("ok", "warn", "bad", "accent")]
    used += [("accent-ink", "accent"), ("ink-muted", "accent-soft"), ("warn", "surface"), ("ok", "surface")]
    poor = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in used}
    assert {pair: ratio for pair, ratio in poor.items() if ratio < 4.5} == {}
