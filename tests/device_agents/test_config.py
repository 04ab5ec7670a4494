"""Settings: file, then environment, then flags; every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_agents.config import AgentConfig, load_config
from device_agents.errors import BadConfiguration


def test_flags_win_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('name = "file"\nport = 1\nhost = "::1"\n[labels]\nroom = "kitchen"\n')
    environment = {"QOE_AGENT_NAME": "environment", "QOE_AGENT_PORT": "2", "PATH": "/bin"}
    config = load_config(path=path, environment=environment, flags={"name": "flag", "port": None})
    assert (config.name, config.port, config.host) == ("flag", 2, "::1")
    assert config.labels == {"room": "kitchen"}


def test_labels_can_be_written_in_one_variable() -> None:
    config = load_config(path=None, environment={"QOE_AGENT_LABELS": "limits=real, applications=digits"})
    assert config.labels == {"limits": "real", "applications": "digits"}


def test_a_secret_can_stand_in_a_file_and_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("very-secret-token\n")
    config = load_config(path=None, environment={"QOE_AGENT_TOKEN_FILE": str(tmp_path / "token")})
    assert config.token == "very-secret-token"
    assert "very-secret-token" not in repr(config)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"QOE_AGENT_PORT": "many"}, "port"),
        ({"QOE_AGENT_PORT": "70000"}, "port"),
        ({"QOE_AGENT_PROT": "1"}, "prot: there is no such setting; did you mean port?"),
        ({"QOE_AGENT_XYZZY": "1"}, "xyzzy: there is no such setting$"),
        ({"QOE_AGENT_LABELS": "kitchen"}, "labels"),
        ({"QOE_AGENT_NAME": "no spaces"}, "name"),
        ({"QOE_AGENT_CPU_QUOTA_EMULATED": "-1"}, "cpu_quota_emulated"),
        ({"QOE_AGENT_TOKEN_FILE": "/nowhere"}, "QOE_AGENT_TOKEN_FILE"),
    ],
)
def test_a_wrong_setting_is_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(BadConfiguration, match=says):
        load_config(path=None, environment=environment)


@pytest.mark.parametrize("text", ["name =", "nmae = 'x'"])
def test_a_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "agent.toml").write_text(text)
    with pytest.raises(BadConfiguration, match=r"agent\.toml|nmae"):
        load_config(path=tmp_path / "agent.toml", environment={})


def test_the_configuration_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        AgentConfig().port = 1  # type: ignore[misc]  # that it is frozen is the point


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "agent.md").read_text(encoding="utf-8")
    missing = [setting for setting in AgentConfig.model_fields if f"`{setting}`" not in text]
    assert missing == []
