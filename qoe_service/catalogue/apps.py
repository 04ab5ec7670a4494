from django.apps import AppConfig


class CatalogueConfig(AppConfig):
    name = "qoe_service.catalogue"
    label = "catalogue"
