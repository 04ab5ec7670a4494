from django.apps import AppConfig


class RolloutsConfig(AppConfig):
    name = "qoe_service.rollouts"
    label = "rollouts"
