"""The repository keeps its own promises: one-way imports, complete migrations, documented surfaces, pinned packages."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from device_agents import wire

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_folders_import_one_another_in_one_direction_only() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    outcome = run(str(lint_imports))
    assert outcome.returncode == 0, outcome.stdout


def test_no_migration_is_missing() -> None:
    outcome = run(sys.executable, "manage.py", "makemigrations", "--check", "--dry-run")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def names_read_from_the_environment() -> set[str]:
    """First arguments of every env_* call in settings.py."""
    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "qoe_service/settings.py").read_text()))
        if isinstance(node, ast.Call)
    ]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id.startswith("env_")
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def test_every_setting_is_documented() -> None:
    documented = (ROOT / "docs/settings.md").read_text()
    names = names_read_from_the_environment()
    assert len(names) > 20
    assert not [name for name in sorted(names) if f"`{name}`" not in documented]


def test_no_setting_is_documented_that_does_not_exist() -> None:
    table = re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs/settings.md").read_text(), flags=re.MULTILINE)
    assert not set(table) - names_read_from_the_environment()


def test_every_wire_message_is_documented() -> None:
    documented = (ROOT / "docs/wire.md").read_text()
    messages = [
        name
        for name, value in vars(wire).items()
        if inspect.isclass(value) and issubclass(value, wire.Message) and value is not wire.Message
    ]
    assert len(messages) > 20
    assert not [name for name in messages if f"`{name}`" not in documented]


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for document in DOCS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target and not target.startswith("mailto:") and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken


@pytest.mark.parametrize("name", ["run.txt", "dev.txt", "agent.txt"])
def test_requirements_are_pinned_with_hashes_and_name_no_address(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text
    pins = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert len(pins) > 15
    assert not [pin.splitlines()[0] for pin in pins if "==" not in pin.splitlines()[0] or "--hash=sha256:" not in pin]


def test_every_dependency_has_its_reason() -> None:
    for project in (ROOT / "pyproject.toml", ROOT / "device_agents/pyproject.toml"):
        lines = project.read_text().splitlines()
        assert not [
            line
            for line in lines
            if re.match(r'^    "[a-z-]+(\[[a-z-]+\])?\s*(~=|==|>=)?.*",?\s*$', line) and "#" not in line
        ]


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = [step["run"] for step in workflow["jobs"]["ci"]["steps"] if "run" in step]
    assert runs == ["bash .ci/run"]


def test_compose_starts_commands_that_exist_with_settings_that_exist() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {"web", "worker", "learner", "beat", "postgres", "redis"} <= set(services)
    assert sum(name.startswith("agent") for name in services) == 2
    known = names_read_from_the_environment()
    for name, service in services.items():
        if name.startswith("agent") or name in {"postgres", "redis"}:
            continue
        given = {key.removesuffix("_FILE") for key in service.get("environment", {})}
        assert given <= known, f"{name}: {given - known}"


@pytest.mark.parametrize("module", ["selector", "device_agents.wire"])
def test_the_libraries_import_alone(module: str) -> None:
    forbidden = "django celery redis" + (" numpy onnxruntime httpx" if module == "device_agents.wire" else "")
    program = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {forbidden.split()!r}))"
    assert run(sys.executable, "-c", program).returncode == 0


def test_public_functions_of_the_libraries_have_docstrings() -> None:
    bare = []
    for path in [*ROOT.glob("selector/*.py"), *ROOT.glob("device_agents/*.py")]:
        if path.name.startswith("__"):
            continue
        module = importlib.import_module(f"{path.parent.name}.{path.stem}")
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", None) == module.__name__
            if (
                is_own
                and not name.startswith("_")
                and (inspect.isclass(value) or inspect.isfunction(value))
                and not value.__doc__
            ):
                bare.append(f"{module.__name__}.{name}")
    assert not bare


def test_set_up_passes_over_names_that_run_no_python(tmp_path: Path) -> None:
    """Version managers leave commands on the PATH which only print advice; the next name is tried."""
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "none.txt").touch()
    names = tmp_path / "names"
    names.mkdir()
    for name in ("python3.13", "python3.12"):
        (names / name).write_text("#!/bin/sh\necho 'command not found; it exists in 3.13.0' >&2\nexit 127\n")
        (names / name).chmod(0o755)
    (names / "python3.11").symlink_to(sys.executable)
    outcome = subprocess.run(
        ["bash", str(ROOT / "requirements/install.sh"), "", "requirements/none.txt"],
        cwd=tmp_path,
        env={"PATH": f"{names}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / ".venv/bin/python").exists()
