"""Reads settings from the environment, and fails loudly on a bad value. Secrets may also come from ``NAME_FILE``."""

from __future__ import annotations

import os
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


def env_str(name: str, default: str) -> str:
    """The text of ``name``."""
    return os.environ.get(name, default)


def env_secret(name: str, default: str | None = None) -> str | None:
    """The text of ``name``, or of the file that ``NAME_FILE`` names."""
    path = os.environ.get(f"{name}_FILE")
    if path:
        try:
            return Path(path).read_text().strip()
        except OSError as error:
            raise ImproperlyConfigured(f"{name}_FILE={path!r} cannot be read: {error.strerror}") from error
    return os.environ.get(name, default)


def env_bool(name: str, default: bool) -> bool:
    """A yes or no."""
    text = os.environ.get(name)
    if text is None:
        return default
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    raise ImproperlyConfigured(f"{name}={text!r} must be one of 1, true, yes, on, 0, false, no, off")


def env_float(name: str, default: float, *, minimum: float = 0.0) -> float:
    """A number of at least ``minimum``."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ImproperlyConfigured(f"{name}={text!r} must be a number") from None
    if not minimum <= value < float("inf"):
        raise ImproperlyConfigured(f"{name}={text!r} must be a number of at least {minimum:g}")
    return value


def env_int(name: str, default: int, *, minimum: int = 0) -> int:
    """A whole number of at least ``minimum``."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise ImproperlyConfigured(f"{name}={text!r} must be a whole number") from None
    if value < minimum:
        raise ImproperlyConfigured(f"{name}={text!r} must be a whole number of at least {minimum}")
    return value


def env_list(name: str, default: str) -> list[str]:
    """Comma-separated words."""
    return [word.strip() for word in os.environ.get(name, default).split(",") if word.strip()]
