"""The one frozen configuration of an agent: defaults, then a TOML file, then QOE_AGENT_* variables, then flags."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from device_agents.errors import BadConfiguration
from device_agents.wire import Name, ShortText

ENVIRONMENT_PREFIX = "QOE_AGENT_"
MEBIBYTE = 1024 * 1024


def default_state_dir() -> Path:
    """/var/lib for a system service, the XDG state folder for everybody else."""
    if os.geteuid() == 0:
        return Path("/var/lib/qoe-agent")
    return Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser() / "qoe-agent"


def default_name() -> str:
    """The host's name, reduced to the characters that a device name may have."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in socket.gethostname())
    return kept.lstrip("._-")[:64] or "device"


class AgentConfig(BaseModel):
    """All that an agent can be told. Unknown settings are an error, so that a misspelt one is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service_url: str = Field(default="", description="address of the service, for example https://qoe.example.org")
    token: str = Field(default="", repr=False, description="enrolment token; needed once")
    name: Name = Field(default_factory=default_name, description="name of this device")
    device_class: Name = Field(default="generic", description="devices of one class share profiles")
    labels: dict[Name, ShortText] = Field(default_factory=dict, max_length=32, description="free labels, KEY=VALUE")
    state_dir: Path = Field(default_factory=default_state_dir, description="folder of everything that is kept")
    host: str = Field(default="127.0.0.1", description="address that the local server binds to")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=8600, description="port of it; 0 takes a free one")
    allow_plaintext: bool = Field(default=False, description="allow http:// to other machines")
    ca_bundle: str = Field(default="", description="file of trusted certificate authorities")
    disk_budget_bytes: Annotated[int, Field(gt=0)] = Field(default=512 * MEBIBYTE, description="for variants on disk")
    disk_reserve_bytes: Annotated[int, Field(ge=0)] = Field(default=32 * MEBIBYTE, description="always left free")
    spool_budget_bytes: Annotated[int, Field(gt=0)] = Field(default=32 * MEBIBYTE, description="for unsent feedback")
    spool_max_age_s: Annotated[float, Field(gt=0)] = Field(default=14 * 86_400.0, description="older feedback goes")
    queue_requests: Annotated[int, Field(ge=1, le=100_000)] = Field(default=64, description="waiting, per model")
    body_limit_bytes: Annotated[int, Field(gt=0)] = Field(default=16 * MEBIBYTE, description="largest request")
    profile_budget_s: Annotated[float, Field(ge=0.05, le=2)] = Field(default=0.3, description="spent per warm-up")
    cpu_quota_emulated: Annotated[float, Field(ge=0, le=64)] = Field(
        default=0.0, description="EMULATED limit: sleep after each run so that CPU time / wall time <= this; 0 = off"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error; to standard error"
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        if any(not separator for _, separator, _ in pairs):
            raise ValueError("labels are written KEY=VALUE,KEY=VALUE")
        return {key.strip(): text.strip() for key, _, text in pairs}

    @field_validator("service_url")
    @classmethod
    def _without_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/")


def load_config(
    *, path: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any] | None = None
) -> AgentConfig:
    """Builds the configuration; raises BadConfiguration naming the setting that is wrong."""
    values: dict[str, Any] = {}
    if path is not None:
        values |= _read_toml(path)
    values |= _read_environment(environment)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return AgentConfig(**values)
    except ValidationError as error:
        raise BadConfiguration("; ".join(map(_problem, error.errors()))) from error


def _problem(error: ErrorDetails) -> str:
    """What is wrong with one setting, in words for its owner."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg']}"
    from difflib import get_close_matches  # noqa: PLC0415 - memory that an agent without trouble does not need

    similar = get_close_matches(name, AgentConfig.model_fields, n=1)
    return f"{name}: there is no such setting{f'; did you mean {similar[0]}?' if similar else ''}"


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib  # noqa: PLC0415 - memory that an agent without a file does not need

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfiguration(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfiguration(f"{path} is no TOML file: {error}") from error


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        setting = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or setting == "config":
            continue
        if setting.endswith("_file"):
            values[setting.removesuffix("_file")] = _read_secret(variable, text)
        else:
            values[setting] = text
    return values


def _read_secret(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{variable}: {error}") from error
