"""ASGI entry point of the web process."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "qoe_service.settings")
django_application = get_asgi_application()

from django.conf import settings  # noqa: E402 - after Django is set up
from django.urls import get_resolver  # noqa: E402

from qoe_service.transport import limit_bodies, route, short_ways  # noqa: E402

application = limit_bodies(route(short_ways(), otherwise=django_application), settings.MAX_BODY_BYTES)
# Loaded before anybody can connect: a fleet that comes back would queue up while the first request loads them.
get_resolver().url_patterns  # noqa: B018 - reading them is what loads them
