"""What operators take back from the command line."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from qoe_service.catalogue import jobs
from qoe_service.decisions import policies
from qoe_service.fleet import keys
from qoe_service.fleet.models import AuditEntry, SigningKey
from tests.builders import NOW, make_application_key
from tests.qoe_service import calls
from tests.qoe_service.rollouts.conftest import Site

pytestmark = pytest.mark.django_db


def revoke(*arguments: object) -> str:
    out = StringIO()
    call_command("revoke", *map(str, arguments), stdout=out)
    return out.getvalue().strip()


def verbs() -> list[str]:
    return list(AuditEntry.objects.filter(actor="command").values_list("verb", flat=True))


def test_a_revoked_device_is_refused_from_now_on(site: Site) -> None:
    assert revoke("device") == f"{site.device.pk} {site.device.name}"
    revoke("device", site.device.pk)
    assert calls.check_in(site.device).status_code == 401
    assert (revoke("device"), verbs()) == ("", ["revoke"])


def test_a_replaced_credential_ends_the_old_one_and_is_printed(site: Site) -> None:
    word, credential = revoke("credential", site.device.pk).split()
    assert word == "credential"
    assert calls.check_in(site.device).status_code == 401
    assert calls.check_in(site.device, credential=credential).status_code == 200


def test_a_revoked_application_key_opens_nothing(site: Site) -> None:
    key = make_application_key()
    assert revoke("key") == f"{key.pk} digits test app"
    revoke("key", key.pk)
    assert calls.get("/api/v1/applications", credential="k" * 43).status_code == 401


def test_a_retired_signing_key_signs_no_more() -> None:
    [old] = keys.signing_keys(now=NOW)
    new = keys.create_signing_key(actor="test", now=NOW)
    revoke("signing-key", old.key_id)
    assert revoke("signing-key") == new.key_id
    assert SigningKey.objects.get(key_id=old.key_id).retired_at is not None


def test_a_lifted_ban_bans_nobody(site: Site) -> None:
    now = timezone.now()
    ban = policies.ban(
        application=site.application, device=site.device, variant_digest=site.small.artifact_id, reason="slow", now=now
    )
    assert revoke("ban").startswith(f"{ban.pk} digits {site.device.pk} ")
    revoke("ban", ban.pk)
    later = now + timedelta(seconds=10)
    assert policies.bans_of(application=site.application, device=site.device, now=later) == {}
    assert (revoke("ban"), verbs()) == ("", ["lift_ban"])


def test_a_job_is_cancelled_once(site: Site) -> None:
    job = jobs.queue(base=site.small, compression_pass="static-int8", parameters={}, now=NOW)
    assert revoke("job") == f"{job.pk} digits digits-small static-int8 queued"
    revoke("job", job.pk)
    job.refresh_from_db()
    assert job.state == "cancelled"
    with pytest.raises(CommandError, match="ended already"):
        revoke("job", job.pk)
    assert verbs() == ["cancel_job"]


@pytest.mark.parametrize("kind", ["device", "credential", "key", "signing-key", "ban", "job"])
def test_what_does_not_exist_cannot_be_revoked(kind: str) -> None:
    with pytest.raises(CommandError, match=r"no .*99"):
        revoke(kind, 99)
    assert verbs() == []


@pytest.mark.parametrize("kind", ["key", "ban", "job"])
@pytest.mark.parametrize("given", ["first", "-1 ", "1.5", "9" * 30])
def test_what_is_no_number_is_said_so(kind: str, given: str) -> None:
    with pytest.raises(CommandError, match="must be a number"):
        revoke(kind, given)
