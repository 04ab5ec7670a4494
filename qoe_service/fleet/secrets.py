"""Bearer secrets: 256 random bits, stored as SHA-256 and compared in constant time.

A password hasher would only slow the device paths down: there is nothing to guess in 256 random bits.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


def new_secret(prefix: str) -> str:
    """A secret that says in its first letters what it opens."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def sha256_of(secret: str) -> str:
    """What the database holds of a secret."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def is_same(left_sha256: str, right_sha256: str) -> bool:
    """Whether two stored forms are equal, in a time that tells nothing."""
    return hmac.compare_digest(left_sha256, right_sha256)
