"""The Celery application. Tasks take ids, make one call, and are safe to run twice."""

from __future__ import annotations

import os

from celery import Celery

from qoe_service import broker

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "qoe_service.settings")

broker.register()
app = Celery("qoe_service")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
