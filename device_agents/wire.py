"""Every message between agents, apps and the service, as frozen pydantic models.

Nothing but shapes and bounds lives here. Unknown fields are ignored and fields are only ever added, with
defaults, so that an agent one release older or newer than its service keeps working.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

WIRE_VERSION = "1.2"
FEEDBACK_BATCH_LIMIT = 500
SAMPLES_LIMIT = 200

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the artifact, lower-case hex")]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=31_536_000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Bytes = Annotated[int, Field(ge=0, le=2**53)]
ShortText = Annotated[str, Field(max_length=256)]


class Message(BaseModel):
    """Base of all wire messages: frozen, unknown fields ignored, no silent inf or NaN."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


# -- enrolment ---------------------------------------------------------------------------------------------------


class Hardware(Message):
    """What a device is made of; changes rarely."""

    architecture: ShortText = ""
    cpu_model: ShortText = ""
    cores: Annotated[int, Field(ge=1, le=4096)] = 1
    memory_bytes: Bytes = 0
    isa: tuple[Name, ...] = Field(default=(), max_length=32, description="for example avx2, avx512, vnni, neon-dot")
    runtime_version: ShortText = ""
    cpu_quota_cores: Annotated[float, Field(gt=0, le=4096)] | None = Field(
        default=None, description="CPU time per second that the operating system grants, in cores; None: no limit"
    )
    cpu_quota_period_ms: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        default=None, description="how often that CPU time is granted anew; None: no limit, or not known"
    )


class EnrolmentRequest(Message):
    """An agent trades an enrolment token for a credential of its own."""

    token: Annotated[str, Field(min_length=16, max_length=256)]
    name: Name
    device_class: Name = "generic"
    agent_version: ShortText = ""
    hardware: Hardware = Hardware()
    labels: dict[Name, ShortText] = Field(default_factory=dict, max_length=32)


class TrustedKey(Message):
    """A public key that may sign desired documents."""

    key_id: Name
    algorithm: Literal["ed25519"] = "ed25519"
    public_key: ShortText = Field(description="base64 of the 32 raw bytes")


class EnrolmentReply(Message):
    """The device's identity; the credential is shown this once only."""

    device_id: Identifier
    credential: ShortText
    trusted_keys: tuple[TrustedKey, ...] = ()
    check_in_interval_s: Seconds = 30
    keys_version: Count = Field(default=0, description="version of trusted_keys; since wire 1.1")


# -- signatures ----------------------------------------------------------------------------------------------------


class Signature(Message):
    """One signature over the UTF-8 bytes of the document."""

    key_id: Name
    algorithm: Literal["ed25519"] = "ed25519"
    value: ShortText = Field(description="base64 of the 64 raw bytes")


class KeySet(Message):
    """The keys that may sign from now on. Versions only grow; a set not above the one known is ignored."""

    kind: Literal["key_set"]
    version: Count
    issued_at: datetime
    keys: tuple[TrustedKey, ...] = Field(min_length=1, max_length=16)


class SignedKeySet(Message):
    """A KeySet as the exact JSON text that was signed; a device follows it if a key that it trusts now signed it."""

    document: Annotated[str, Field(max_length=32_768)]
    signatures: tuple[Signature, ...] = ()


# -- check-in: what is ---------------------------------------------------------------------------------------------


class UpdateState(StrEnum):
    """States of the update machine of one application on one device."""

    IDLE = "idle"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    STAGED = "staged"
    WARMING = "warming"
    SOAKING = "soaking"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"


class Outcome(StrEnum):
    """How an attempt to follow a decision ended."""

    COMMITTED = "committed"
    ALREADY_RUNNING = "already_running"
    ROLLED_BACK = "rolled_back"
    NO_SPACE = "no_space"
    VERIFY_FAILED = "verify_failed"
    DOWNLOAD_FAILED = "download_failed"
    INCOMPATIBLE = "incompatible"
    SUPERSEDED = "superseded"


class Telemetry(Message):
    """What a device measures of itself; None where the operating system does not tell."""

    cpu_load_share: Share = Field(default=0.0, description="load of other processes, share of all cores")
    memory_free_bytes: Bytes = 0
    temperature_c: Annotated[float, Field(ge=-100, le=300)] | None = None
    throttled: bool = False
    battery_share: Share | None = None
    charging: bool | None = None
    network: Literal["ethernet", "wifi", "metered", "offline", "unknown"] = "unknown"
    downlink_mbps: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None, description="rate of the last large download; None when there was none within an hour"
    )


class ApplicationReport(Message):
    """What one application on the device is doing right now, as the device says."""

    application: Name
    state: UpdateState
    running_digest: Digest | None = None
    decision_id: Identifier | None = Field(default=None, description="decision that the running model follows")
    lease_active_s: Seconds = Field(default=0, description="active time of that decision so far")
    arrival_rate_rps: Annotated[float, Field(ge=0, le=1e6)] = 0
    cached_digests: tuple[Digest, ...] = Field(default=(), max_length=256)
    overridden: bool = False


class OutcomeReport(Message):
    """The end of one attempt to follow a decision."""

    application: Name
    decision_id: Identifier
    outcome: Outcome
    reason: Annotated[str, Field(max_length=1024)] = ""
    evidence: Literal["traffic", "synthetic", "none"] = "none"
    download_bytes: Bytes = 0
    swap_ms: Milliseconds = Field(default=0, description="from seeing the desired state to serving it")
    at: datetime


class GoldenTensor(Message):
    """The first values of one output; strings are told by their shape alone."""

    name: ShortText
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=16)
    values: tuple[float, ...] = Field(default=(), max_length=32)


class GoldenOutput(Message):
    """What a variant answered to one row of fixed input. Comparable where input and ``computed_by`` are the same."""

    input: Name
    computed_by: ShortText = Field(description="runtime and instruction sets")
    outputs: tuple[GoldenTensor, ...] = Field(default=(), max_length=8)


class ProfileReport(Message):
    """Measured on the device: a run of a batch of n takes a_ms * n + b_ms."""

    digest: Digest
    threads: Annotated[int, Field(ge=1, le=1024)]
    a_ms: Milliseconds
    b_ms: Milliseconds
    r2: Annotated[float, Field(ge=-1e6, le=1)] = 1.0
    load_ms: Milliseconds = 0
    memory_bytes: Bytes = 0
    cpu_ms_per_row: Milliseconds | None = Field(default=None, description="CPU time of a run, per row of its batch")
    golden: GoldenOutput | None = Field(default=None, description="None where not known, or never twice the same")


class AccuracyReport(Message):
    """How right a variant was, on this device, on samples that the service sent.

    ``correct`` counts right (or agreeing) answers; a regression tells the share of variance explained and its interval.
    """

    kind: Literal["top-1", "regression", "agreement"]
    samples: Annotated[int, Field(ge=1, le=SAMPLES_LIMIT)]
    correct: Annotated[int, Field(ge=0, le=SAMPLES_LIMIT)] | None = None
    value: Share = 0.0
    low: Share = 0.0
    high: Share = 1.0


class ProfilingResult(Message):
    """What became of one profiling job: what was measured, and on which instruction sets, or why nothing was."""

    job_id: Identifier
    architecture: ShortText = ""
    isa: tuple[Name, ...] = Field(default=(), max_length=32)
    profile: ProfileReport | None = None
    accuracy: AccuracyReport | None = None
    error: Annotated[str, Field(max_length=1024)] = ""


class ProfilingState(Message):
    """Whether the device would measure a variant now, which job it has, and what came of those before."""

    is_idle: bool = False
    busy_with: ShortText = Field(default="", description="why it is not idle")
    job_id: Identifier | None = Field(default=None, description="the job that it has and has not finished")
    results: tuple[ProfilingResult, ...] = Field(default=(), max_length=16, description="told until acknowledged")


class CheckIn(Message):
    """Reported state and telemetry; never by itself a reason to decide."""

    sent_at: datetime
    agent_version: ShortText = ""
    desired_version_seen: Count = 0
    hardware: Hardware | None = None
    telemetry: Telemetry = Telemetry()
    applications: tuple[ApplicationReport, ...] = Field(default=(), max_length=64)
    outcomes: tuple[OutcomeReport, ...] = Field(default=(), max_length=256)
    profiles: tuple[ProfileReport, ...] = Field(default=(), max_length=256)
    dropped: dict[Name, Count] = Field(default_factory=dict, max_length=64, description="records lost, by reason")
    serving_url: ShortText = Field(default="", description="where the device's inference server listens")
    keys_version: Count | None = Field(
        default=None, description="version of the keys that the device trusts; None: it follows no rotation"
    )
    profiling: ProfilingState | None = Field(
        default=None, description="None: this agent runs no profiling jobs; since wire 1.2"
    )


class CheckInReply(Message):
    """When to come again, and whether there is anything new to fetch."""

    check_in_interval_s: Seconds
    desired_version: Count
    server_time: datetime
    keys: SignedKeySet | None = Field(default=None, description="only when the device knows an older version")


class WakeUp(Message):
    """Data of a server-sent ``wake`` event: look at the desired state, some time within ``spread_s``."""

    version: Count
    spread_s: Seconds = Field(default=0, description="wide when many are woken at once, so that they do not all come")


# -- desired state: what should be -----------------------------------------------------------------------------------


class VariantReference(Message):
    """Where a variant's bytes are, and how to know them."""

    digest: Digest
    name: ShortText
    size_bytes: Bytes
    url: Annotated[str, Field(max_length=1024)] = Field(description="absolute, or a path on the service")


class WeightReference(Message):
    """Bytes of an artifact from ``offset`` on that other artifacts may hold too."""

    digest: Digest
    offset: Bytes
    size_bytes: Bytes


class SharedWeights(Message):
    """Where the large weights of a variant lie, so that a device which has some of them need not fetch those."""

    weights: tuple[WeightReference, ...] = Field(default=(), max_length=512)


class ServingConfiguration(Message):
    """The bounds inside which the device's own controller may move."""

    max_batch: Annotated[int, Field(ge=1, le=1024)] = 1
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    controller: bool = False


class HealthGate(Message):
    """When a swapped model is committed or rolled back."""

    min_requests: Count = 10
    soak_s: Seconds = 5
    max_error_share: Share = 0.02
    max_p95_ms: Milliseconds | None = None


class DesiredApplication(Message):
    """What one application on the device should run."""

    application: Name
    model_name: Name
    decision_id: Identifier
    variant: VariantReference
    serving: ServingConfiguration
    health_gate: HealthGate = HealthGate()
    fallback: VariantReference | None = None
    lease_s: Seconds = Field(description="active time after which the lease ends and is reported")
    slo_p95_ms: Milliseconds
    trace_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None


class ProfilingJob(Message):
    """A variant to measure while the device is idle, and held-out samples to measure its accuracy on."""

    job_id: Identifier
    variant: VariantReference
    samples: VariantReference = Field(description="an .npz of at most SAMPLES_LIMIT samples and what is right for each")
    threads: Annotated[int, Field(ge=1, le=1024)] = 1


class DesiredState(Message):
    """All that a device should run. Versions only grow; a version not above the one seen is ignored."""

    version: Count
    device_id: Identifier
    issued_at: datetime
    expires_at: datetime
    check_in_interval_s: Seconds = 30
    applications: tuple[DesiredApplication, ...] = Field(default=(), max_length=64)
    profiling: ProfilingJob | None = Field(default=None, description="at most one at a time; since wire 1.2")


class SignedDesired(Message):
    """A DesiredState as the exact JSON text that was signed."""

    document: Annotated[str, Field(max_length=32_768)]
    signatures: tuple[Signature, ...] = ()


# -- feedback --------------------------------------------------------------------------------------------------------


class Components(Message):
    """What was measured under a decision; the application's QoE formula turns it into a reward."""

    requests: Count = 0
    errors: Count = 0
    p50_ms: Milliseconds | None = None
    p95_ms: Milliseconds | None = None
    p99_ms: Milliseconds | None = None
    slo_hit_share: Share | None = None
    throughput_rps: Annotated[float, Field(ge=0, le=1e6)] | None = None
    cpu_ms_per_request: Milliseconds | None = None
    accuracy: Share | None = Field(default=None, description="share of answers found right, where someone can tell")
    service_ms: Milliseconds | None = Field(default=None, description="mean time of one run in the runtime")
    batch_mean: Annotated[float, Field(ge=0, le=1024)] | None = None
    batch_histogram: dict[str, Count] = Field(default_factory=dict, max_length=64)
    concurrency_histogram: dict[str, Count] = Field(default_factory=dict, max_length=64)


class Feedback(Message):
    """One report about one decision, from the device itself or from an app that used the model."""

    id: Identifier = Field(description="chosen by the sender; sending it again does nothing")
    decision_id: Identifier
    components: Components | None = None
    rating: Share | None = Field(default=None, description="a user's rating; 0 is a rating, absent is none")
    lease_closed: bool = Field(default=False, description="device only: the lease is over, nothing more will come")
    active_s: Seconds = 0
    controller_version: ShortText = ""
    overridden: bool = False
    observed_at: datetime | None = None


class FeedbackBatch(Message):
    """Up to FEEDBACK_BATCH_LIMIT reports; each gets its own result."""

    items: tuple[Feedback, ...] = Field(min_length=1, max_length=FEEDBACK_BATCH_LIMIT)


class FeedbackStatus(StrEnum):
    """What became of one feedback."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"
    ORPHAN = "orphan"
    REJECTED = "rejected"


class FeedbackResult(Message):
    """The answer to one feedback."""

    id: ShortText
    status: FeedbackStatus
    detail: Annotated[str, Field(max_length=1024)] = ""


class FeedbackBatchReply(Message):
    """Results in the order of the items."""

    results: tuple[FeedbackResult, ...]


# -- errors ----------------------------------------------------------------------------------------------------------


class FieldProblem(Message):
    """One field that was wrong, and what is allowed there."""

    field: str
    detail: str


class Problem(Message):
    """Body of every 4xx and 5xx answer of the service (RFC 9457, application/problem+json)."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str = ""
    fields: tuple[FieldProblem, ...] = ()
    trace_id: str | None = None
