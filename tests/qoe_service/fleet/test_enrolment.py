from __future__ import annotations

from datetime import timedelta

import pytest
from django.conf import LazySettings
from django.utils import timezone

from device_agents.wire import EnrolmentReply
from qoe_service.fleet import enrolment
from qoe_service.fleet.models import AuditEntry, Device, EnrolmentToken
from tests.builders import make_device
from tests.qoe_service import calls

pytestmark = pytest.mark.django_db
PATH = "/api/v1/devices/enrol"


def issue(uses: int = 1, ttl_s: float | None = None) -> str:
    return enrolment.issue_token(label="test", uses=uses, ttl_s=ttl_s, actor="command", now=timezone.now())


def test_a_token_buys_a_credential_that_opens_the_devices_own_endpoints() -> None:
    body = {"token": issue(), "name": "shelf-camera", "device_class": "camera", "labels": {"site": "north"}}
    reply = EnrolmentReply.model_validate_json(calls.post(PATH, body, credential=None).content)
    device = Device.objects.get(pk=reply.device_id)
    assert (device.name, device.device_class, device.labels) == ("shelf-camera", "camera", {"site": "north"})
    assert len(reply.trusted_keys) == 1
    assert calls.check_in(device, credential=reply.credential).status_code == 200


def test_secrets_are_stored_only_as_hashes() -> None:
    token = issue()
    reply = calls.post(PATH, {"token": token, "name": "a"}, credential=None).json()
    stored = str(list(Device.objects.values())) + str(list(EnrolmentToken.objects.values()))
    assert token not in stored
    assert reply["credential"] not in stored


@pytest.mark.parametrize("token", ["x" * 43, "qoe_enrol_" + "\N{SNOWMAN}" * 20])
def test_a_wrong_token_enrols_nobody(token: str) -> None:
    answer = calls.post(PATH, {"token": token, "name": "a"}, credential=None)
    calls.problem(answer, status=401, code="not_authenticated", field="token")
    assert not Device.objects.exists()


def test_a_token_enrols_as_many_agents_as_it_says() -> None:
    token = issue(uses=2)
    answers = [calls.post(PATH, {"token": token, "name": "a"}, credential=None).status_code for _ in range(3)]
    assert answers == [200, 200, 401]
    assert Device.objects.count() == 2


def test_an_expired_token_enrols_nobody() -> None:
    token = issue(ttl_s=60)
    EnrolmentToken.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert calls.post(PATH, {"token": token, "name": "a"}, credential=None).status_code == 401


def test_a_name_that_is_no_name_is_refused_by_its_field_and_keeps_the_token() -> None:
    token = issue()
    answer = calls.post(PATH, {"token": token, "name": "no spaces!"}, credential=None)
    calls.problem(answer, status=400, code="invalid_input", field="name")
    assert EnrolmentToken.objects.get().uses_left == 1


def test_a_revoked_device_is_refused_at_once() -> None:
    device = make_device()
    assert calls.check_in(device).status_code == 200
    enrolment.revoke(device_id=device.pk, actor="anna", now=timezone.now())
    answer = calls.check_in(device)
    calls.problem(answer, status=401, code="not_authenticated")
    assert "Bearer" in answer["WWW-Authenticate"]


def test_revoking_is_audited_once() -> None:
    device = make_device()
    for _ in range(2):
        enrolment.revoke(device_id=device.pk, actor="anna", now=timezone.now())
    assert list(AuditEntry.objects.values_list("actor", "verb", "subject")) == [
        ("anna", "revoke", f"device:{device.pk}")
    ]


def test_a_rotated_credential_replaces_the_old_one() -> None:
    device = make_device()
    fresh = enrolment.rotate_credential(device_id=device.pk, actor="anna", now=timezone.now())
    assert calls.check_in(device).status_code == 401
    assert calls.check_in(device, credential=fresh).status_code == 200


@pytest.mark.parametrize("authorization", ["", "Bearer", "Basic abc", "Bearer nobody", "Bearer " + "x" * 5000])
def test_no_or_a_wrong_credential_is_refused(authorization: str) -> None:
    device = make_device()
    headers = {"Authorization": authorization} if authorization else {}
    answer = calls.get(f"/api/v1/devices/{device.pk}/desired", credential=None, **headers)
    calls.problem(answer, status=401, code="not_authenticated")


def test_enrolments_from_one_address_are_limited(settings: LazySettings) -> None:
    settings.ENROLMENTS_PER_MINUTE = 2
    token = issue(uses=10)
    answers = [calls.post(PATH, {"token": token, "name": "a"}, credential=None) for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    calls.problem(answers[-1], status=429, code="too_many_requests")
    assert 1 <= int(answers[-1]["Retry-After"]) <= 60
    assert Device.objects.count() == 2


def test_requests_of_one_device_are_limited_without_slowing_another(settings: LazySettings) -> None:
    settings.DEVICE_REQUESTS_PER_MINUTE = 2
    device, other = make_device(), make_device("other", credential="o" * 43)
    answers = [calls.check_in(device) for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1]["Retry-After"]) <= 60
    assert calls.check_in(other, credential="o" * 43).status_code == 200
