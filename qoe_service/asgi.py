"""ASGI entry point of the web process."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "qoe_service.settings")
django_application = get_asgi_application()

from django.conf import settings  # noqa: E402 - after Django is set up

from qoe_service.transport import LookHandler, SharedThreadHandler, limit_bodies, route  # noqa: E402

application = limit_bodies(
    route(wake_ups=SharedThreadHandler(), looks=LookHandler(), everything_else=django_application),
    settings.MAX_BODY_BYTES,
)
