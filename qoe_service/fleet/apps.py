from django.apps import AppConfig


class FleetConfig(AppConfig):
    name = "qoe_service.fleet"
    label = "fleet"
