"""Profiles that are there already were measured with the instruction sets that their devices have now."""

from typing import Any

from django.db import migrations

FAMILY = ("avx2", "avx512", "vnni", "amx", "neon-dot", "i8mm")


def isa_of(hardware: dict[str, Any]) -> str:
    architecture, words = hardware.get("architecture", ""), hardware.get("isa", ())
    return " ".join([architecture, *(word for word in FAMILY if word in words)]) if architecture else ""


def fill(apps: Any, _: Any) -> None:
    for device in apps.get_model("fleet", "Device").objects.only("pk", "hardware"):
        apps.get_model("catalogue", "Profile").objects.filter(device=device).update(isa=isa_of(device.hardware))


class Migration(migrations.Migration):
    dependencies = [("catalogue", "0011_profiling_jobs")]

    operations = [migrations.RunPython(fill, migrations.RunPython.noop)]
