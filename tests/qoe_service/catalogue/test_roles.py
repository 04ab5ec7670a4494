"""Who may change a catalogue: an operator without the permission is told so, by the API and by the page."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command
from django.test import Client

from qoe_service.catalogue import roles
from qoe_service.catalogue.models import Application, Job, Upload, Variant
from qoe_service.decisions.models import Ban
from qoe_service.fleet.models import AuditEntry
from tests.builders import NOW, make_application, make_variant
from tests.web.reading import text_of

pytestmark = pytest.mark.django_db
PAGE = "/applications/digits/catalogue/"
FORMS = ("retire:wide", "restore:wide", "ban:wide", "lift:1", "compress:wide", "cancel-job:1", "run-again:1")


@pytest.fixture(autouse=True)
def family() -> Application:
    application = make_application()
    make_variant(application, "wide")
    variant = make_variant(application, "old", retired_at=NOW)
    Job.objects.create(
        application=application, base=variant, compression_pass="float16", state=Job.State.FAILED, created_at=NOW
    )
    return application


def logged_in(role: str) -> Client:
    user = User.objects.create_user("ada")
    roles.give(username="ada", role=role, actor="test", now=NOW)
    client = Client()
    client.force_login(user)
    return client


def post(client: Client, path: str, body: dict[str, Any] | None = None) -> int:
    return client.post(f"/api/v1/{path}", body or {}, content_type="application/json").status_code


def test_a_viewer_sees_the_page_without_its_buttons(family: Application) -> None:
    viewer = logged_in("viewer")
    page = viewer.get(PAGE).content.decode()
    for word in ("retire:", "restore:", "ban:", "run-again:", "compress:", 'id="upload"'):
        assert word not in page, word
    assert "wide" in page
    assert "Take the family elsewhere" in text_of(viewer.get(PAGE))


def test_what_a_viewer_posts_all_the_same_is_refused_and_changes_nothing() -> None:
    viewer = logged_in("viewer")
    for word in FORMS:
        assert viewer.post(PAGE, {"do": word}).status_code == 403, word
    assert post(viewer, "applications/digits/uploads", {"file_name": "a.onnx", "size_bytes": 1}) == 403
    assert post(viewer, "applications/digits/variants/wide/passes", {"passes": ["float16"]}) == 403
    for path in ("applications/digits/variants/wide/retire", "applications/digits/variants/old/restore"):
        assert post(viewer, path) == 403, path
    for verb in ("cancel", "run-again"):
        assert post(viewer, f"jobs/{Job.objects.get().pk}/{verb}") == 403
    assert not Upload.objects.exists()
    assert not Ban.objects.exists()
    assert Variant.objects.get(name="wide").retired_at is None
    assert Job.objects.get().state == "failed"


def test_the_refusal_names_the_permission_that_is_missing() -> None:
    answer = logged_in("viewer").post("/api/v1/applications/digits/variants/wide/retire")
    assert answer.json()["detail"] == "ada may not retire or restore variants: catalogue.retire_variants is missing"
    assert answer.json()["code"] == "not_permitted"


def test_an_editor_has_the_buttons_and_they_work() -> None:
    editor = logged_in("editor")
    page = editor.get(PAGE).content.decode()
    for word in ("retire:", "restore:", "ban:", "run-again:", "compress:", 'id="upload"'):
        assert word in page, word
    assert editor.post(PAGE, {"do": "retire:wide"}).status_code == 302
    assert editor.post(PAGE, {"do": "ban:wide"}).status_code == 302
    assert Variant.objects.get(name="wide").retired_at is not None
    assert Ban.objects.count() == 1
    assert post(editor, "applications/digits/uploads", {"file_name": "a.onnx", "size_bytes": 1}) == 201


def test_permissions_can_be_given_one_by_one() -> None:
    client = logged_in("viewer")
    User.objects.get().user_permissions.add(Permission.objects.get(codename="ban_variants"))
    assert client.post(PAGE, {"do": "ban:wide"}).status_code == 302
    assert client.post(PAGE, {"do": "retire:wide"}).status_code == 403


def test_the_command_gives_a_role_takes_the_former_one_and_is_in_the_audit_log(capsys: Any) -> None:
    User.objects.create_superuser("eve")
    for role in ("editor", "viewer"):
        call_command("give_role", "eve", role)
    eve = User.objects.get(username="eve")
    assert not any(roles.held_by(eve).values())
    assert capsys.readouterr().out == "eve is an editor\neve is a viewer\n"
    assert AuditEntry.objects.filter(subject="operator:eve", actor="command").count() == 2
    with pytest.raises(CommandError, match="no operator 'nobody'"):
        call_command("give_role", "nobody", "viewer")
