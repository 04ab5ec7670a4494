"""The family of variants that `python -m demo check` serves comes out of the catalogue by its own commands."""

from __future__ import annotations

from pathlib import Path

from demo import models
from demo.installation import APPLICATIONS, PASSES, Installation, Secrets
from demo.service import Service


def test_the_demo_has_at_least_eight_variants_to_choose_from(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", port=0)
    installation = Installation(service, Secrets(tmp_path / "secrets"), tmp_path / "models")
    bases = {application: len(installation.model_files(application)) for application in APPLICATIONS}
    assert sum(count * (1 + len(PASSES[application])) for application, count in bases.items()) >= 8


def test_every_variant_comes_as_the_file_that_the_catalogue_judged(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", port=0, settings={"DJANGO_SETTINGS_MODULE": "qoe_service.settings"})
    service.manage("migrate", "--verbosity", "0")
    installation = Installation(service, Secrets(tmp_path / "secrets"), tmp_path / "models", only_baseline=True)
    family = installation.family("digits")
    assert [row["name"] for _, row in family] == ["digits-small", "digits-small-static-int8"]
    for file, row in family:
        assert f"sha256:{models.sha256(file)}" == row["digest"]
        assert 0.8 < row["accuracy"] < 0.9
