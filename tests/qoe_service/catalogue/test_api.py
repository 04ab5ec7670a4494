from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.test import Client

from tests.builders import make_application, make_application_key, make_variant

pytestmark = pytest.mark.django_db

BY_KEY = {"Authorization": f"Bearer {'k' * 43}"}


def test_an_operator_sees_all_applications_and_an_app_its_own() -> None:
    make_application("digits", baseline_variant="digits-small")
    make_application("letters")
    make_application_key("digits")
    client = Client()
    by_key = client.get("/api/v1/applications", headers=BY_KEY).json()
    assert [(each["name"], each["baseline_variant"]) for each in by_key] == [("digits", "digits-small")]
    client.force_login(User.objects.create(username="operator"))
    assert [each["name"] for each in client.get("/api/v1/applications").json()] == ["digits", "letters"]


def test_variants_are_shown_with_what_was_measured() -> None:
    application = make_application()
    base = make_variant(application, "digits-small")
    derived = make_variant(application, "digits-small-int8", base=base, compression_pass="static-int8", accuracy=None)
    make_application_key()
    first, second = Client().get("/api/v1/applications/digits/variants", headers=BY_KEY).json()
    assert (first["name"], first["digest"], first["size_bytes"]) == ("digits-small", base.artifact_id, 100_000)
    assert (first["accuracy"], first["accuracy_low"], first["is_selectable"]) == (0.9, 0.88, True)
    assert (second["base"], second["digest"], second["is_selectable"]) == ("digits-small", derived.artifact_id, False)


def test_a_variant_says_what_its_accuracy_is_a_share_of_and_where_it_can_be_cut() -> None:
    cut = {"tensor": "pool", "dtype": "uint8", "shape": [8, 4, 4], "bytes": 128}
    cut |= {"flops_before": 1e6, "flops_after": 2e6}
    application = make_application()
    judged = {"kind": "agreement", "dataset": "f" * 64}  # which the application has no more
    make_variant(application, "cut", details={"accuracy": judged, "cuts": [cut]})
    make_variant(application, "uncut", details={"cuts": [], "no_cuts_because": "models of 2 GiB and more are not cut"})
    make_application_key()
    first, second = Client().get("/api/v1/applications/digits/variants", headers=BY_KEY).json()
    assert (first["accuracy_kind"], first["cuts"], first["no_cuts_because"]) == ("agreement", [cut], "")
    assert (second["accuracy_kind"], second["cuts"]) == ("", [])
    assert (first["is_judged_by_former_data"], second["is_judged_by_former_data"]) == (True, False)
    assert second["no_cuts_because"] == "models of 2 GiB and more are not cut"


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("applications", {}, 401, "not_authenticated"),
        ("applications", {"Authorization": "Bearer wrong"}, 401, "not_authenticated"),
        ("applications/letters/variants", BY_KEY, 403, "not_permitted"),
        ("applications/digits/variants", {}, 401, "not_authenticated"),
    ],
)
def test_others_get_a_problem(path: str, headers: dict[str, str], status: int, code: str) -> None:
    make_application_key("digits")
    make_application("letters")
    response = Client().get(f"/api/v1/{path}", headers=headers)
    assert (response.status_code, response.json()["code"]) == (status, code)


def test_an_unknown_application_is_not_found() -> None:
    client = Client()
    client.force_login(User.objects.create(username="operator"))
    assert client.get("/api/v1/applications/nothing/variants").status_code == 404


@pytest.mark.parametrize("name", ["%00", "a%00b", "a" * 65])
def test_what_cannot_be_a_name_is_refused_by_its_field(name: str) -> None:
    client = Client()
    client.force_login(User.objects.create(username="operator"))
    answer = client.get(f"/api/v1/applications/{name}/variants")
    assert (answer.status_code, answer.json()["fields"][0]["field"]) == (400, "name")
