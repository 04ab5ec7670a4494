"""The service's settings. Without any environment they run everything embedded: SQLite and a serverless broker.

Every setting that the environment may change stands here once, and in docs/settings.md.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import dj_database_url
from django.core.exceptions import ImproperlyConfigured
from django.core.management.utils import get_random_secret_key

from qoe_service.environment import env_bool, env_float, env_int, env_list, env_secret, env_str

BASE_DIR = Path(__file__).resolve().parent.parent

# Where the embedded database, the broker's folder, artifacts and generated secrets live.
DATA_DIR = Path(env_str("DATA_DIR", str(BASE_DIR / "var" / "service")))
DATA_DIR.mkdir(parents=True, exist_ok=True)


def _secret_key() -> str:
    given = env_secret("SECRET_KEY")
    if given:
        return given
    path = DATA_DIR / "secret_key"
    if not path.exists():
        # Several processes may start at once: a file appears under its name complete, and only the first one's does.
        descriptor, own = tempfile.mkstemp(prefix="secret_key.", dir=DATA_DIR)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(get_random_secret_key())
            with suppress(FileExistsError):
                os.link(own, path)
        finally:
            os.unlink(own)
    return path.read_text().strip()


SECRET_KEY = _secret_key()
DEBUG = env_bool("DEBUG", False)
ALLOWED_HOSTS = env_list("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")
CSRF_TRUSTED_ORIGINS = env_list("CSRF_TRUSTED_ORIGINS", "")
SECURE_COOKIES = env_bool("SECURE_COOKIES", False)
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_COOKIES
TRUST_PROXY = env_bool("TRUST_PROXY", False)
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if TRUST_PROXY else None

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_htmx",
    "ninja",
    "qoe_service.fleet",
    "qoe_service.catalogue",
    "qoe_service.decisions",
    "qoe_service.rollouts",
    "web",
]

MIDDLEWARE = [
    "qoe_service.observability.TraceMiddleware",
    "qoe_service.problems.ProblemMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]

ROOT_URLCONF = "qoe_service.urls"
ASGI_APPLICATION = "qoe_service.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# -- database, broker, cache -----------------------------------------------------------------------------------------

DATABASE_URL = env_secret("DATABASE_URL", f"sqlite:///{DATA_DIR / 'db.sqlite3'}") or ""
# Under ASGI most requests have a thread of their own, so a connection kept after them would only leak. Where threads
# stay, so does theirs (connections.py), and is checked before each use.
DATABASES: dict[str, Any] = {"default": dj_database_url.parse(DATABASE_URL, conn_max_age=0, conn_health_checks=True)}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-16000;",
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

REDIS_URL = env_secret("REDIS_URL", "") or ""
# A Redis that hangs must not hold up requests: every use of it can do without.
REDIS_TIMEOUTS_S = {"socket_timeout": 5.0, "socket_connect_timeout": 5.0}
# Variants and signing keys for a second: private keys must not leave the process. Without Redis also an entry for each
# caller that is limited; those thrown out would be counted anew.
CACHES: dict[str, Any] = {
    "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "OPTIONS": {"MAX_ENTRIES": 100_000}}
}

BROKER_DIR = DATA_DIR / "broker"
if REDIS_URL:
    CELERY_BROKER_URL = REDIS_URL
    CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, Any] = {"visibility_timeout": 3600, **REDIS_TIMEOUTS_S}
else:
    BROKER_DIR.mkdir(parents=True, exist_ok=True)
    CELERY_BROKER_URL = "folder://localhost"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(BROKER_DIR),
        "data_folder_out": str(BROKER_DIR),
        "polling_interval": env_float("BROKER_POLL_S", 0.1, minimum=0.01),
    }
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_DEFAULT_QUEUE = "service"
CELERY_TASK_ROUTES = {"qoe_service.decisions.tasks.learn": {"queue": "learning"}}
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_ACKS_LATE = False  # the database is the queue of record; a lost message is sent again by beat
RESCAN_S = env_float("RESCAN_S", 2.0, minimum=0.2)
CELERY_BEAT_SCHEDULE = {
    name: {"task": task, "schedule": RESCAN_S, "options": {"expires": RESCAN_S * 5}}
    for name, task in {
        "reconcile": "qoe_service.rollouts.tasks.reconcile_due",
        "close": "qoe_service.decisions.tasks.close_due",
        "learn": "qoe_service.decisions.tasks.learn",
        "compress": "qoe_service.catalogue.tasks.run_queued",
        "prune": "qoe_service.rollouts.tasks.prune",
        "collect": "qoe_service.catalogue.tasks.collect",
    }.items()
}
CELERY_BEAT_SCHEDULE["prune"]["schedule"] = 60.0
CELERY_BEAT_SCHEDULE["collect"]["schedule"] = 3600.0
CELERY_BEAT_SCHEDULE_FILENAME = str(DATA_DIR / "beat")

# -- artifacts -------------------------------------------------------------------------------------------------------

ARTIFACT_DIR = Path(env_str("ARTIFACT_DIR", str(DATA_DIR / "artifacts")))
# With a bucket, artifacts live there, and ARTIFACT_DIR only holds what is on its way.
ARTIFACT_BUCKET = env_str("ARTIFACT_BUCKET", "")
ARTIFACT_S3_ENDPOINT = env_str("ARTIFACT_S3_ENDPOINT", "")
ARTIFACT_S3_REGION = env_str("ARTIFACT_S3_REGION", "")
ARTIFACT_S3_ACCESS_KEY = env_secret("ARTIFACT_S3_ACCESS_KEY", "") or ""
ARTIFACT_S3_SECRET_KEY = env_secret("ARTIFACT_S3_SECRET_KEY", "") or ""
ARTIFACT_KEEP_S = env_float("ARTIFACT_KEEP_S", 86_400.0, minimum=0)
UPLOAD_TTL_S = env_float("UPLOAD_TTL_S", 86_400.0, minimum=60)
COMPRESSION_JOBS = env_int("COMPRESSION_JOBS", 1, minimum=1)
SANDBOX_MEMORY_BYTES = env_int("SANDBOX_MEMORY_BYTES", 2 * 2**30, minimum=2**28)

# -- devices, apps and their limits ----------------------------------------------------------------------------------

CHECK_IN_INTERVAL_S = env_float("CHECK_IN_INTERVAL_S", 30.0, minimum=0.1)
CHECK_IN_JITTER_SHARE = env_float("CHECK_IN_JITTER_SHARE", 0.2)
DESIRED_TTL_S = env_float("DESIRED_TTL_S", 7 * 86_400.0, minimum=1)
WAKE_UP_POLL_S = env_float("WAKE_UP_POLL_S", 0.25, minimum=0.05)
WAKE_UP_MAX_AGE_S = env_float("WAKE_UP_MAX_AGE_S", 600.0, minimum=1)
MAX_BODY_BYTES = env_int("MAX_BODY_BYTES", 1_048_576, minimum=1024)
DATA_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES
DEVICE_REQUESTS_PER_MINUTE = env_int("DEVICE_REQUESTS_PER_MINUTE", 600, minimum=1)
APPLICATION_REQUESTS_PER_MINUTE = env_int("APPLICATION_REQUESTS_PER_MINUTE", 6000, minimum=1)
ENROLMENTS_PER_MINUTE = env_int("ENROLMENTS_PER_MINUTE", 120, minimum=1)
FEEDBACK_PER_DECISION = env_int("FEEDBACK_PER_DECISION", 1000, minimum=1)

# -- learning --------------------------------------------------------------------------------------------------------

LEARN_INTERVAL_S = env_float("LEARN_INTERVAL_S", 1.0, minimum=0.0)
POLICY_STATES_KEPT = env_int("POLICY_STATES_KEPT", 50, minimum=1)
FIRST_POLICY_AFTER = env_int("FIRST_POLICY_AFTER", 12, minimum=1)
BAN_TTL_S = env_float("BAN_TTL_S", 3600.0, minimum=1)
ACTIVATION_TIMEOUT_S = env_float("ACTIVATION_TIMEOUT_S", 300.0, minimum=1)

# -- console ---------------------------------------------------------------------------------------------------------

LOGIN_URL = "/login/"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/login/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.ScryptPasswordHasher"]
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
STATIC_ROOT.mkdir(exist_ok=True)
WHITENOISE_USE_FINDERS = True
STATICFILES_FINDERS = ["django.contrib.staticfiles.finders.AppDirectoriesFinder", "web.finders.PlotlyFinder"]
LANGUAGE_CODE = "en-gb"
TIME_ZONE = "UTC"
USE_TZ = True

# -- logging: one event per line, ids as fields ----------------------------------------------------------------------

LOG_LEVEL = env_str("LOG_LEVEL", "INFO").upper()
if LOG_LEVEL not in {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}:
    raise ImproperlyConfigured(f"LOG_LEVEL={LOG_LEVEL!r} must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"trace": {"()": "qoe_service.observability.TraceFilter"}},
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s trace_id=%(trace_id)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["trace"]}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"qoe_service": {"level": LOG_LEVEL}, "web": {"level": LOG_LEVEL}},
}
