"""Who may do what to a family of variants: Django permissions, and the roles that bundle them.

A viewer reads everything; an editor hands in files, queues and stops passes, retires and bans; an owner may do all that
the service knows. Single permissions can be given with Django's own means.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group, Permission
from django.db import transaction

from qoe_service.errors import InvalidInput, NotFound, NotPermitted
from qoe_service.fleet import audit

UPLOAD, RETIRE, BAN = "catalogue.upload_models", "catalogue.retire_variants", "catalogue.ban_variants"
MAY = {UPLOAD: "hand in files or change jobs", RETIRE: "retire or restore variants", BAN: "ban variants"}
VIEWER, EDITOR, OWNER = ROLES = ("viewer", "editor", "owner")
EDITORS = "editors"


def require(user: Any, permission: str) -> None:
    """Raises NotPermitted, naming what is missing, unless the operator has this permission."""
    if not user.has_perm(permission):
        raise NotPermitted(f"{user.get_username()} may not {MAY[permission]}: {permission} is missing")


def held_by(user: Any) -> dict[str, bool]:
    """Which permissions an operator has, by the last part of their names."""
    return {each.partition(".")[2]: user.has_perm(each) for each in MAY}


def give(*, username: str, role: str, actor: str, now: datetime) -> None:
    """Make an operator a viewer, an editor or an owner. Raises InvalidInput, NotFound."""
    if role not in ROLES:
        raise InvalidInput(f"there are {', '.join(ROLES)}", field="role")
    with transaction.atomic():
        user = get_user_model().objects.filter(username=username).first()
        if user is None:
            raise NotFound(f"no operator {username[:64]!r}", field="username")
        user.is_superuser = user.is_staff = role == OWNER
        user.save(update_fields=["is_superuser", "is_staff"])
        user.user_permissions.clear()
        user.groups.set([_editors()] if role == EDITOR else [])
        audit.record(actor=actor, verb=f"give_role_{role}", subject=f"operator:{username}", now=now)


def _editors() -> Group:
    group, _ = Group.objects.get_or_create(name=EDITORS)
    names = [each.partition(".")[2] for each in MAY]
    group.permissions.set(Permission.objects.filter(content_type__app_label="catalogue", codename__in=names))
    return group
