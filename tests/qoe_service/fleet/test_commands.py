from __future__ import annotations

from io import StringIO

import pytest
from django.contrib.auth import authenticate
from django.core.management import CommandError, call_command

from qoe_service.fleet import keys
from qoe_service.fleet.models import EnrolmentToken
from tests.qoe_service import calls

pytestmark = pytest.mark.django_db


def output_of(*command: str) -> str:
    out = StringIO()
    call_command(*command, stdout=out)
    return out.getvalue().strip()


def test_the_operators_password_is_printed_once_and_logs_in() -> None:
    words = output_of("create_operator").split()
    assert words[:3] == ["operator", "operator", "password"]
    user = authenticate(username="operator", password=words[3])
    assert user is not None
    assert user.is_staff
    assert output_of("create_operator") == "operator operator exists"
    assert authenticate(username="operator", password=words[3]) is not None


def test_issue_token_prints_a_token_that_enrols() -> None:
    token = output_of("issue_token", "--label", "shelf", "--uses", "3", "--ttl", "60")
    answer = calls.post("/api/v1/devices/enrol", {"token": token, "name": "a"}, credential=None)
    assert answer.status_code == 200
    row = EnrolmentToken.objects.get()
    assert (row.label, row.uses_left, row.expires_at is None) == ("shelf", 2, False)


def test_issue_token_says_what_is_wrong_with_its_arguments() -> None:
    with pytest.raises(CommandError, match="uses must be at least 1"):
        call_command("issue_token", "--uses", "0")


def test_issue_key_prints_a_key_of_that_application() -> None:
    secret = output_of("issue_key", "digits")
    assert keys.authenticate_application(secret=secret).application == "digits"
