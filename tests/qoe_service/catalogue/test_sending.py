"""An engineer's command sends a file to a service elsewhere: through breaks, from where it stopped, to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.contrib.auth import get_user_model
from django.core.wsgi import get_wsgi_application
from django.utils import timezone
from pytest_django import Settings

from qoe_service.catalogue import uploads
from qoe_service.catalogue.models import Upload
from qoe_service.catalogue.sending import Sender
from qoe_service.errors import InvalidInput, NotAuthenticated, Unavailable
from tests.builders import make_application
from tests.qoe_service.catalogue.tiny_models import dense_model, write_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("quick_profiler")]


class Flaky(httpx.BaseTransport):
    """The service itself, behind a line that breaks at the requests that ``breaks`` picks."""

    def __init__(self, breaks: Callable[[int, httpx.Request], bool] = lambda _, __: False) -> None:
        self.service = httpx.WSGITransport(app=get_wsgi_application())
        self.breaks = breaks
        self.puts = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.puts += request.method == "PUT"
        if self.breaks(self.puts, request):
            raise httpx.ConnectError("the line is cut")
        return self.service.handle_request(request)


def sender(transport: Flaky) -> Sender:
    def work_meanwhile(_: float) -> None:
        for upload_id in uploads.runnable(now=timezone.now()):
            uploads.run(upload_id=upload_id, clock=timezone.now)

    get_user_model().objects.get_or_create(
        username="ada", defaults={"password": "md5$salt$" + "0" * 32, "is_superuser": True}
    )
    user = get_user_model().objects.get(username="ada")
    user.set_password("secret")
    user.save()
    found = Sender(httpx.Client(base_url="http://localhost", transport=transport), pause=work_meanwhile)
    found.log_in("ada", "secret")
    return found


@pytest.fixture
def model(tmp_path: Path, settings: Settings) -> Path:
    make_application("quarters")
    settings.MAX_BODY_BYTES = 400
    return write_model(tmp_path / "dense.onnx", dense_model())


def send(transport: Flaky, path: Path, **options: Any) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    reports: list[Mapping[str, Any]] = []
    ended = sender(transport).send(application="quarters", path=path, options=options, report=reports.append)
    return ended, reports


def test_a_file_goes_out_in_parts_and_its_end_is_reported(model: Path) -> None:
    ended, reports = send(Flaky(), model, passes=["dynamic-int8"])
    assert (ended["state"], ended["variant"]) == ("done", "dense")
    received = [each["received_bytes"] for each in reports if each["state"] == "receiving"]
    assert received == list(range(0, model.stat().st_size, 400))


def test_a_broken_line_is_tried_again_and_no_byte_is_sent_twice(model: Path) -> None:
    cut: list[int] = []

    def once_each(puts: int, request: httpx.Request) -> bool:
        is_new = request.method == "PUT" and puts not in cut and len(cut) < 2
        cut.extend([puts, puts + 1] if is_new else [])
        return is_new

    transport = Flaky(once_each)
    ended, _ = send(transport, model)
    assert ended["state"] == "done"
    assert transport.puts == -(-model.stat().st_size // 400) + 1


def test_a_second_start_goes_on_where_the_first_was_cut(model: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        send(Flaky(lambda puts, request: request.method == "PUT" and puts > 2), model)
    assert Upload.objects.get().received_bytes == 800
    transport = Flaky()
    assert send(transport, model)[0]["state"] == "done"
    assert transport.puts == -(-model.stat().st_size // 400) - 2
    assert Upload.objects.count() == 1


def test_refusals_name_the_field(model: Path) -> None:
    with pytest.raises(InvalidInput, match="no such pass") as refusal:
        send(Flaky(), model, passes=["magic"])
    assert refusal.value.field == "passes"
    stranger = Sender(httpx.Client(base_url="http://localhost", transport=Flaky()))
    with pytest.raises(NotAuthenticated):
        stranger.log_in("ada", "wrong")
