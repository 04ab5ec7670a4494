"""Routes of the operator console."""

from __future__ import annotations

from django.urls import path

from web import catalogue_views, views

app_name = "web"
urlpatterns = [
    path("", views.fleet, name="fleet"),
    path("devices/<str:device_id>/", views.device, name="device"),
    path("applications/<str:name>/", views.application, name="application"),
    path("applications/<str:name>/verdict/", views.verdict, name="verdict"),
    path("applications/<str:name>/qoe.json", views.qoe_chart, name="qoe_chart"),
    path("applications/<str:name>/qoe/", views.qoe_words, name="qoe_words"),
    path("applications/<str:name>/catalogue/", catalogue_views.catalogue, name="catalogue"),
    path("applications/<str:name>/catalogue.json", catalogue_views.catalogue_figure, name="catalogue_figure"),
    path("decisions/<str:decision_id>/", views.decision, name="decision"),
    path("login/", views.LogIn.as_view(), name="login"),
    path("logout/", views.LogOut.as_view(), name="logout"),
]
