"""What an operator can do on the Catalogue page: each word of a form calls the service function that the API calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qoe_service.catalogue import exploration, jobs, profiling, retirement, roles, tasks, uploads
from qoe_service.catalogue.models import Application
from qoe_service.catalogue.passes import chains
from qoe_service.decisions import policies
from qoe_service.errors import InvalidInput
from qoe_service.fleet import audit


@dataclass(frozen=True, slots=True)
class Wanted:
    """One press of a button: which thing is meant, by whom, on what."""

    application: Application
    subject: str
    actor: str
    now: datetime
    passes: str = ""


def perform(verb: str, wanted: Wanted, user: Any) -> str:
    """Do it, and say what was done. Raises ServiceError, NotPermitted where ``user`` lacks the permission for it."""
    if verb not in _VERBS:
        raise InvalidInput(f"there are {', '.join(_VERBS)}", field="do")
    permission, do = _VERBS[verb]
    roles.require(user, permission)
    return do(wanted)


def _retire(wanted: Wanted) -> str:
    variant = retirement.get(wanted.application, wanted.subject)
    retirement.retire(variant=variant, actor=wanted.actor, now=wanted.now)
    return f"{variant.name} is retired: it is chosen no more, and runs on where its lease still lasts."


def _restore(wanted: Wanted) -> str:
    variant = retirement.get(wanted.application, wanted.subject)
    retirement.restore(variant=variant, actor=wanted.actor, now=wanted.now)
    return f"{variant.name} may be chosen again."


def _ban(wanted: Wanted) -> str:
    variant = retirement.get(wanted.application, wanted.subject)
    policies.ban(
        application=wanted.application,
        device=None,
        variant_digest=variant.artifact_id,
        reason=f"by {wanted.actor}"[:200],
        now=wanted.now,
    )
    audit.record(actor=wanted.actor, verb="ban", subject=f"variant:{variant.name}", now=wanted.now)
    return f"{variant.name} is banned on every device for now."


def _lift(wanted: Wanted) -> str:
    policies.lift_ban(ban_id=_number(wanted.subject), now=wanted.now)
    audit.record(actor=wanted.actor, verb="lift_ban", subject=f"ban:{wanted.subject}", now=wanted.now)
    return "The ban is lifted."


def _compress(wanted: Wanted) -> str:
    variant = retirement.get(wanted.application, wanted.subject)
    queued = jobs.queue_chains(base=variant, chains=chains([wanted.passes]), now=wanted.now)
    tasks.wake_workers()
    return f"{len(queued)} {'job is' if len(queued) == 1 else 'jobs are'} queued for {variant.name}."


def _cancel_job(wanted: Wanted) -> str:
    stopped = jobs.cancel(job_id=_number(wanted.subject), actor=wanted.actor, now=wanted.now)
    return "The job is cancelled." if stopped else "The job had ended already."


def _run_again(wanted: Wanted) -> str:
    jobs.run_again(job_id=_number(wanted.subject), now=wanted.now)
    tasks.wake_workers()
    return "The job is queued again."


def _cancel_upload(wanted: Wanted) -> str:
    stopped = uploads.cancel(upload_id=wanted.subject, now=wanted.now)
    return "The upload is cancelled." if stopped else "The upload had ended already."


def _explore(wanted: Wanted) -> str:
    variant = retirement.get(wanted.application, wanted.subject)
    exploration.allow(variant=variant, is_allowed=True, actor=wanted.actor, now=wanted.now)
    return f"Devices may try {variant.name} before anybody of their class has measured it."


def _measure_first(wanted: Wanted) -> str:
    variant = retirement.get(wanted.application, wanted.subject)
    exploration.allow(variant=variant, is_allowed=False, actor=wanted.actor, now=wanted.now)
    return f"{variant.name} goes to a class of devices once one of them has measured it."


def _cancel_profiling(wanted: Wanted) -> str:
    profiling.cancel(job_id=_number(wanted.subject), actor=wanted.actor, now=wanted.now)
    return "It is measured no more; its device hears of it at its next check-in."


def _measure_again(wanted: Wanted) -> str:
    profiling.run_again(job_id=_number(wanted.subject), actor=wanted.actor, now=wanted.now)
    return "The next device of that class that is idle measures it."


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidInput("must be a number", field="do")
    return int(text)


_VERBS: dict[str, tuple[str, Callable[[Wanted], str]]] = {
    "retire": (roles.RETIRE, _retire),
    "restore": (roles.RETIRE, _restore),
    "ban": (roles.BAN, _ban),
    "lift": (roles.BAN, _lift),
    "compress": (roles.UPLOAD, _compress),
    "cancel-job": (roles.UPLOAD, _cancel_job),
    "run-again": (roles.UPLOAD, _run_again),
    "cancel-upload": (roles.UPLOAD, _cancel_upload),
    "explore": (roles.BAN, _explore),
    "measure-first": (roles.BAN, _measure_first),
    "cancel-profiling": (roles.UPLOAD, _cancel_profiling),
    "measure-again": (roles.UPLOAD, _measure_again),
}
