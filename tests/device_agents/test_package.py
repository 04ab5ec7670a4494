"""The package `qoe-agent` alone, away from this repository, has all that it needs and nothing else of ours."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="the development packages for this Python hold no setuptools"
)


@needs_setuptools
def test_the_installed_agent_needs_no_repository(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves folders behind
    shutil.copytree(ROOT / "device_agents", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
        assert {each for each in folders if not each.endswith(".dist-info")} == {"device_agents"}
        archive.extractall(tmp_path / "installed")
    # The repository must not be found; the packages that the agent depends on may.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "device_agents", "profile", str(ROOT / "demo/models/digits-small.onnx"), "--json"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["a_ms"] > 0
    where = [sys.executable, "-c", "import device_agents; print(device_agents.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(tmp_path)
