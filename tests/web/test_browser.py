"""The console in a real Chromium: log-in, following links, live parts, themes, phones, and what it must not do."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.test import Client
from django.utils import timezone
from playwright.sync_api import Page, Route
from pytest_django import DjangoDbBlocker
from pytest_django.live_server_helper import LiveServer

from qoe_service.catalogue import uploads
from qoe_service.catalogue.models import Upload
from qoe_service.decisions.models import Decision
from qoe_service.rollouts.models import Assignment
from tests.web.browser import Browser, Session, Visit, log_in
from tests.web.demo_rows import seed_fleet

# The server's threads share the test's in-memory connection: they see what a test changes, and its end takes it back.
pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery staple"


@pytest.fixture(scope="module")
def console(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[Session]:
    """One server and one small fleet for the whole module."""
    with django_db_blocker.unblock():
        server = LiveServer("127.0.0.1")
        try:
            client = Client()
            client.force_login(get_user_model().objects.create_superuser("ada", password=PASSWORD))
            seed_fleet(now=timezone.now(), leases=6)
            yield Session(str(server.url), client.cookies["sessionid"].value)
        finally:
            for thread in threading.enumerate():  # what still answers closes the shared connection when it ends
                if "process_request_thread" in thread.name:
                    thread.join(5)
            server.stop()
            call_command("flush", interactive=False, verbosity=0)


@pytest.fixture
def desk(browser: Browser, console: Session) -> Iterator[Visit]:
    """A desktop window on the Fleet page; afterwards, nothing may have gone wrong in it."""
    with browser.visit(session=console) as visit:
        visit.do(lambda page: page.goto(console.url))
        yield visit
    assert visit.errors == []
    assert {urlsplit(each).netloc for each in visit.urls} == {urlsplit(console.url).netloc}


def overflow_px(page: Page) -> int:
    """By how much the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_an_operator_logs_in_and_follows_fleet_to_device_to_decision(browser: Browser, console: Session) -> None:
    def follow(page: Page) -> list[str]:
        log_in(page, console.url, "ada", PASSWORD)
        titles = [page.title()]
        page.get_by_role("link", name="phone", exact=True).click()
        page.get_by_role("heading", name="Recent decisions").wait_for()
        titles.append(page.title())
        page.get_by_role("region", name="Recent decisions").get_by_role("link").first.click()
        page.get_by_role("heading", name="Candidates").wait_for()
        assert page.get_by_role("row").filter(has_text="chosen").count() == 1
        return [*titles, page.title()]

    with browser.visit() as visit:
        fleet, device, decision = visit.do(follow)
    assert (fleet, device) == ("Fleet · Edge QoE", "phone · Edge QoE")
    assert decision.startswith("Decision ")
    assert visit.errors == []


def test_a_wrong_password_is_told_without_a_hint_which_half_was_wrong(browser: Browser, console: Session) -> None:
    def try_wrong(page: Page) -> str:
        page.goto(f"{console.url}/devices/d-phone/")
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill("wrong")
        page.keyboard.press("Enter")
        told = page.get_by_role("alert").inner_text()
        page.get_by_label("Password").fill(PASSWORD)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="phone").wait_for()
        return told

    with browser.visit() as visit:
        assert "Name and password do not match" in visit.do(try_wrong)


def test_a_change_appears_without_reload_and_keeps_the_focus(desk: Visit) -> None:
    def look(page: Page) -> None:
        page.evaluate("window.isSamePage = true")
        page.locator("#device-d-phone").focus()

    desk.do(look)
    Assignment.objects.filter(device="d-phone").update(reported_state="rolled_back")

    def wait(page: Page) -> tuple[bool, str]:
        page.get_by_role("row").filter(has_text="rolled back").wait_for()
        return page.evaluate("window.isSamePage"), page.evaluate("document.activeElement.id")

    assert desk.do(wait) == (True, "device-d-phone")


def test_pause_stops_the_live_parts_until_resumed(desk: Visit) -> None:
    def pause(page: Page) -> str:
        page.get_by_role("button", name="Pause live updates").click()
        return page.locator("#live-status").inner_text()

    assert desk.do(pause) == "Paused"
    Assignment.objects.filter(device="d-camera").update(reported_state="staged")

    def resume(page: Page) -> tuple[int, int]:
        page.wait_for_timeout(2300)
        before = page.get_by_text("staged").count()
        page.get_by_role("button", name="Pause live updates").click()
        page.get_by_text("staged").first.wait_for()
        return before, page.get_by_text("staged").count()

    before, after = desk.do(resume)
    assert before == 0
    assert after >= 1


def test_the_chart_is_drawn_from_our_own_script_and_has_words_for_those_who_cannot_see_it(
    desk: Visit, console: Session
) -> None:
    def open_chart(page: Page) -> str:
        page.goto(f"{console.url}/applications/digits/")
        page.locator(".chart .main-svg .scatterlayer .trace").first.wait_for()
        page.get_by_text("The running mean of QoE went from").wait_for()
        return page.locator(".chart").get_attribute("aria-describedby") or ""

    assert desk.do(open_chart) == "chart-words"
    assert any(each.endswith("/static/plotly/plotly.min.js") for each in desk.urls)


def test_the_theme_follows_the_system_until_the_operator_chooses(browser: Browser, console: Session) -> None:
    def background(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    def choose(page: Page) -> list[str]:
        page.goto(console.url)
        seen = [background(page)]
        for _ in range(2):
            page.locator("#theme").click()
            seen.append(background(page))
        page.reload()
        return [*seen, background(page)]

    dark, light = "rgb(11, 13, 17)", "rgb(246, 247, 249)"
    with browser.visit(scheme="dark", session=console) as visit:
        assert visit.do(choose) == [dark, light, dark, dark]
    with browser.visit(scheme="light", session=console) as visit:
        assert visit.do(choose) == [light, light, dark, dark]


def test_no_page_scrolls_sideways_on_a_phone(browser: Browser, console: Session) -> None:
    decision = Decision.objects.filter(state=Decision.State.JOINED).latest("decided_at")
    paths = ["/", "/devices/d-sensor-hub/", "/applications/digits/", f"/decisions/{decision.pk}/", "/devices/nobody/"]
    paths.append("/applications/digits/catalogue/")

    arrives_later = {"/": ".verdict", "/applications/digits/": ".chart .main-svg"}
    arrives_later["/applications/digits/catalogue/"] = ".chart .main-svg"

    def measure(page: Page) -> dict[str, int]:
        found = {}
        for path in paths:
            page.goto(console.url + path)
            if path in arrives_later:
                page.locator(arrives_later[path]).first.wait_for()
            found[path] = overflow_px(page)
        return found

    with browser.visit(width=390, height=844, session=console) as visit:
        assert visit.do(measure) == dict.fromkeys(paths, 0)
    paths = ["/login/"]
    with browser.visit(width=390, height=844) as visit:
        assert visit.do(measure) == {"/login/": 0}


def test_a_file_is_uploaded_in_parts_through_lost_connections_and_then_followed_to_its_end(
    desk: Visit, console: Session, tmp_path: Path
) -> None:
    content = np.random.default_rng(0).bytes(2_500_000)
    (tmp_path / "big.onnx").write_bytes(content)
    lost: list[str] = []

    def lose_one(route: Route) -> None:
        if route.request.method == "PUT" and not lost:
            lost.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    def send(page: Page) -> None:
        page.goto(f"{console.url}/applications/digits/catalogue/")
        page.route("**/api/v1/uploads/*", lose_one)
        page.get_by_label("File", exact=True).set_input_files(tmp_path / "big.onnx")
        page.get_by_label("Compress it by").select_option("")
        page.get_by_role("button", name="Upload").click()
        page.get_by_text("Sent. Waiting for a worker").wait_for()

    desk.do(send)
    assert len(lost) == 1
    upload = Upload.objects.get(file_name="big.onnx")
    assert [part.size_bytes for part in upload.parts.all()] == [1_048_576, 1_048_576, 402_848]
    assert upload.sha256 == hashlib.sha256(content).hexdigest()
    uploads.run(upload_id=upload.pk, clock=timezone.now)

    def read(page: Page) -> str:
        page.get_by_text("refused: big.onnx is refused").wait_for()
        return str(page.evaluate("document.activeElement.id"))

    assert desk.do(read) == "upload-send"
    desk.errors[:] = [each for each in desk.errors if "ERR_FAILED" not in each]  # the one that we cut off


def test_the_buttons_of_the_catalogue_work_with_the_keyboard(desk: Visit, console: Session) -> None:
    def retire(page: Page) -> str:
        page.goto(f"{console.url}/applications/digits/catalogue/")
        page.get_by_role("button", name="Retire digits-narrow", exact=True).focus()
        page.keyboard.press("Enter")
        return page.get_by_role("status").filter(has_text="is retired").inner_text()

    assert "digits-narrow is retired" in desk.do(retire)


def test_the_keyboard_reaches_the_content_past_the_navigation(desk: Visit) -> None:
    def skip(page: Page) -> str:
        page.reload()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        return str(page.evaluate("document.activeElement.closest('main') ? 'content' : 'navigation'"))

    assert desk.do(skip) == "content"
