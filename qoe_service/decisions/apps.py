from django.apps import AppConfig


class DecisionsConfig(AppConfig):
    name = "qoe_service.decisions"
    label = "decisions"
