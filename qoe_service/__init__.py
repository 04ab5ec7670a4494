"""The backend: fleet, catalogue, decisions and rollouts, over HTTP and Celery."""

from qoe_service.celery import app as celery_app

__all__ = ("celery_app",)
