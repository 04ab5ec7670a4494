"""Which agent this is."""

from __future__ import annotations

from importlib import metadata


def agent_version() -> str:
    """Version of this agent; "dev" when it runs from a source tree."""
    try:
        return metadata.version("qoe-agent")
    except metadata.PackageNotFoundError:
        return "dev"
