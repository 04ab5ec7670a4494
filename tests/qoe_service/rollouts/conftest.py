"""A device, an application and two variants: what most stories of rollouts need."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from qoe_service.catalogue.models import Application, Variant
from qoe_service.fleet.models import Device
from tests.builders import make_application, make_device, make_profile, make_variant
from tests.qoe_service.decisions.conftest import RunTogether, database_file, run_together

__all__ = ["RunTogether", "database_file", "run_together"]


class Site(NamedTuple):
    """One device that may run one application."""

    device: Device
    application: Application
    small: Variant
    large: Variant


@pytest.fixture
def site(db: None) -> Site:
    """The device runs nothing yet."""
    application = make_application()
    small, large = make_variant(application), make_variant(application, "digits-large", accuracy=0.97)
    device = make_device()
    for variant in (small, large):
        make_profile(variant, device)
    return Site(device, application, small, large)
