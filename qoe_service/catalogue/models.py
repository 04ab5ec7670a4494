"""Applications, their artifacts and variants, and what was measured about them."""

from __future__ import annotations

from django.db import models
from django.db.models import F, Q


class Artifact(models.Model):
    """Immutable bytes, known by their sha256."""

    digest = models.CharField(primary_key=True, max_length=64)
    size_bytes = models.PositiveBigIntegerField()
    created_at = models.DateTimeField()
    stored_at = models.DateTimeField(null=True, blank=True, help_text="when somebody last handed these bytes in")

    def __str__(self) -> str:
        return self.digest[:12]


class Piece(models.Model):
    """Bytes of ``whole`` from ``offset`` on that lie in ``stored`` from ``start`` on: weights that variants share, and
    what is left of a file without them. An artifact with pieces has no file of its own."""

    whole = models.ForeignKey(Artifact, on_delete=models.CASCADE, related_name="pieces")
    stored = models.ForeignKey(Artifact, on_delete=models.PROTECT, related_name="+")
    offset = models.PositiveBigIntegerField()
    start = models.PositiveBigIntegerField(default=0)
    size_bytes = models.PositiveBigIntegerField()

    class Meta:
        ordering = ("offset",)
        constraints = [models.UniqueConstraint(fields=("whole", "offset"), name="one_piece_per_offset")]


class Application(models.Model):
    """An inference task with an SLO, a QoE definition, and rules for its leases."""

    name = models.CharField(primary_key=True, max_length=64)
    title = models.CharField(max_length=100)
    slo_p95_ms = models.FloatField()
    minimum_accuracy = models.FloatField(default=0)
    slo_violation_limit = models.FloatField(default=0.5, help_text="P(SLO violation) above which a soft mask applies")
    arrival_rate_rps = models.FloatField(default=1, help_text="assumed until a device reports its own")
    configurations = models.JSONField(default=list, help_text="serving configurations that may be chosen")
    baseline_variant = models.CharField(max_length=64, blank=True, help_text="its name; may be imported later")
    baseline_digest = models.CharField(max_length=64, blank=True, help_text="variant of the safe baseline")
    baseline_configuration = models.JSONField(default=dict, blank=True)
    lease_s = models.FloatField(default=600, help_text="active seconds")
    feedback_wait_s = models.FloatField(
        default=60, help_text="how long a closed lease waits for ratings still under way"
    )
    silence_after_s = models.FloatField(
        default=600, help_text="how long after its end an unreported lease counts as silent"
    )
    silence_reward = models.FloatField(null=True, blank=True, help_text="reward of a silent lease; null drops it")
    epsilon = models.FloatField(default=0.05, help_text="share of decisions drawn uniformly")
    holdout = models.FloatField(default=0.05, help_text="share of decisions kept for references")
    exploration_budget = models.FloatField(
        default=0.05, help_text="share of the baseline's mean QoE that exploring may cost; 1 sets no bound"
    )
    health_gate = models.JSONField(default=dict, blank=True)
    explore_unmeasured = models.BooleanField(
        default=False, help_text="whether devices may try variants that nobody of their class has measured"
    )
    dataset = models.ForeignKey(Artifact, null=True, blank=True, on_delete=models.PROTECT, related_name="+")
    samples = models.ForeignKey(Artifact, null=True, blank=True, on_delete=models.PROTECT, related_name="+")
    samples_from = models.CharField(max_length=64, blank=True, help_text="data set whose samples devices get")
    samples_kind = models.CharField(max_length=16, blank=True)
    samples_count = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField()

    class Meta:
        ordering = ("name",)
        permissions = (
            ("upload_models", "May hand in files, and queue and stop passes"),
            ("retire_variants", "May retire and restore variants"),
            ("ban_variants", "May ban variants and lift bans"),
        )
        constraints = [models.CheckConstraint(condition=Q(slo_p95_ms__gt=0), name="application_slo_is_positive")]

    def __str__(self) -> str:
        return self.title


class QoeFormula(models.Model):
    """One version of an application's QoE definition; the newest applies."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="formulas")
    version = models.PositiveIntegerField()
    definition = models.JSONField(help_text="selector.reward.QoeFormula as a record")
    created_at = models.DateTimeField()

    class Meta:
        ordering = ("-version",)
        constraints = [models.UniqueConstraint(fields=("application", "version"), name="one_formula_per_version")]


class Variant(models.Model):
    """One ONNX artifact of an application, how it was made and how well it does."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="variants")
    artifact = models.ForeignKey(Artifact, on_delete=models.PROTECT, related_name="variants")
    base = models.ForeignKey("self", null=True, blank=True, on_delete=models.PROTECT, related_name="derived")
    name = models.CharField(max_length=100)
    precision = models.CharField(max_length=16, default="fp32")
    compression_pass = models.CharField(max_length=64, blank=True, help_text="empty for an imported model")
    provenance = models.JSONField(default=dict, blank=True)
    details = models.JSONField(
        default=dict, blank=True, help_text="what else was measured: kind of accuracy, cut points"
    )
    inputs = models.JSONField(default=list, blank=True)
    outputs = models.JSONField(default=list, blank=True)
    operators = models.JSONField(default=list, blank=True)
    accuracy = models.FloatField(null=True, blank=True)
    accuracy_low = models.FloatField(null=True, blank=True)
    accuracy_high = models.FloatField(null=True, blank=True)
    accuracy_samples = models.PositiveIntegerField(default=0)
    accuracy_isa = models.CharField(max_length=100, blank=True, help_text="where the accuracy was measured")
    memory_bytes = models.PositiveBigIntegerField(default=0)
    explore_unmeasured = models.BooleanField(default=False, help_text="may be tried where nobody has measured it")
    created_at = models.DateTimeField()
    retired_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ("name",)
        constraints = [
            models.UniqueConstraint(fields=("application", "name"), name="one_variant_per_name"),
            models.UniqueConstraint(fields=("application", "artifact"), name="one_variant_per_artifact"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_selectable(self) -> bool:
        """Whether decisions may choose it: measured, and not retired."""
        return self.accuracy is not None and self.retired_at is None

    @property
    def accuracy_kind(self) -> str:
        """What the accuracy is a share of: top-1, regression or agreement; empty before it was measured."""
        return str(self.details.get("accuracy", {}).get("kind", ""))

    @property
    def accuracy_dataset(self) -> str | None:
        """Digest of the data set that the accuracy was measured on; None where that was not kept."""
        known: str | None = self.details.get("accuracy", {}).get("dataset")
        return known

    @property
    def is_judged_by_former_data(self) -> bool:
        """Whether its accuracy was measured on a data set that its application has replaced; where unknown, not."""
        return self.accuracy_dataset is not None and self.accuracy_dataset != self.application.dataset_id


class Work(models.Model):
    """What a worker claims, reports progress on and finishes. ``attempts`` is the fencing number of its runner."""

    class State(models.TextChoices):
        RECEIVING = "receiving"
        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"
        CANCELLED = "cancelled"
        REFUSED = "refused"

    OPEN_STATES = (State.RECEIVING, State.QUEUED, State.RUNNING)

    state = models.CharField(max_length=16, choices=State, default=State.QUEUED, db_index=True)
    progress = models.FloatField(default=0)
    attempts = models.PositiveIntegerField(default=0)
    heartbeat_at = models.DateTimeField(null=True, blank=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField()
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        abstract = True

    @property
    def is_open(self) -> bool:
        """Whether it may still come to something."""
        return self.state in self.OPEN_STATES


class Job(Work):
    """One compression job. With ``after`` it waits for that job, and its base becomes what that one made."""

    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="jobs")
    base = models.ForeignKey(Variant, on_delete=models.CASCADE, related_name="jobs")
    after = models.ForeignKey("self", null=True, blank=True, on_delete=models.CASCADE, related_name="followers")
    compression_pass = models.CharField(max_length=64)
    parameters = models.JSONField(default=dict, blank=True)
    result = models.ForeignKey(Variant, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")

    class Meta:
        ordering = ("id",)
        constraints = [
            models.UniqueConstraint(
                fields=("base", "compression_pass", "parameters"),
                condition=Q(after=None),
                name="one_job_per_pass",
            ),
            models.UniqueConstraint(fields=("after", "compression_pass", "parameters"), name="one_job_per_next_pass"),
            models.CheckConstraint(condition=Q(progress__gte=0, progress__lte=1), name="job_progress_is_a_share"),
        ]


class Upload(Work):
    """A file on its way in, received in parts; once complete, a worker takes it in."""

    class Kind(models.TextChoices):
        MODEL = "model"
        DATA = "data"
        PACKAGE = "package"

    id = models.CharField(primary_key=True, max_length=32)
    application = models.ForeignKey(Application, on_delete=models.CASCADE, related_name="uploads")
    kind = models.CharField(max_length=16, choices=Kind)
    file_name = models.CharField(max_length=200)
    size_bytes = models.PositiveBigIntegerField()
    received_bytes = models.PositiveBigIntegerField(default=0)
    sha256 = models.CharField(max_length=64, blank=True, help_text="what the sender says; empty when it does not")
    options = models.JSONField(default=dict, blank=True)
    actor = models.CharField(max_length=150, blank=True)
    touched_at = models.DateTimeField(help_text="when the last part arrived")
    result = models.ForeignKey(Variant, null=True, blank=True, on_delete=models.SET_NULL, related_name="+")

    class Meta:
        ordering = ("-created_at",)
        constraints = [
            models.CheckConstraint(condition=Q(received_bytes__lte=F("size_bytes")), name="upload_is_not_overfull")
        ]

    def __str__(self) -> str:
        return self.file_name


class UploadPart(models.Model):
    """Bytes of an upload from ``offset`` on, under their name in the artifact storage until it is taken in."""

    upload = models.ForeignKey(Upload, on_delete=models.CASCADE, related_name="parts")
    offset = models.PositiveBigIntegerField()
    size_bytes = models.PositiveIntegerField()
    name = models.CharField(max_length=200)

    class Meta:
        ordering = ("offset",)
        constraints = [models.UniqueConstraint(fields=("upload", "offset"), name="one_part_per_offset")]


class Profile(models.Model):
    """Measured: a run of a batch of n takes ``a_ms * n + b_ms``. Without a device it was measured on the server."""

    variant = models.ForeignKey(Variant, on_delete=models.CASCADE, related_name="profiles")
    device = models.ForeignKey("fleet.Device", null=True, blank=True, on_delete=models.CASCADE, related_name="profiles")
    isa = models.CharField(max_length=100, blank=True, help_text="instruction sets of the device, places.isa_of")
    threads = models.PositiveIntegerField()
    a_ms = models.FloatField()
    b_ms = models.FloatField()
    r2 = models.FloatField(default=1)
    load_ms = models.FloatField(default=0)
    memory_bytes = models.PositiveBigIntegerField(default=0)
    cpu_ms_per_row = models.FloatField(null=True, blank=True, help_text="CPU time of a run, per row of its batch")
    measured_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=("variant", "device", "threads"), name="one_profile_per_device"),
            models.UniqueConstraint(
                fields=("variant", "threads"), condition=Q(device=None), name="one_profile_on_the_server"
            ),
        ]
        ordering = (F("device").asc(nulls_first=True), "variant", "threads")


class IsaAccuracy(models.Model):
    """Accuracy of a variant on the instruction sets of a device, as that device measured it on samples; the newest."""

    variant = models.ForeignKey(Variant, on_delete=models.CASCADE, related_name="isa_accuracies")
    isa = models.CharField(max_length=100)
    device = models.ForeignKey("fleet.Device", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    device_class = models.CharField(max_length=64)
    kind = models.CharField(max_length=16)
    value = models.FloatField()
    low = models.FloatField()
    high = models.FloatField()
    samples = models.PositiveIntegerField()
    samples_digest = models.CharField(max_length=64)
    measured_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=("variant", "isa"), name="one_accuracy_per_isa"),
            models.CheckConstraint(
                condition=Q(low__gte=0, low__lte=F("value"), value__lte=F("high"), high__lte=1),
                name="isa_accuracy_is_a_share",
            ),
        ]
        ordering = ("variant", "isa")


class ProfilingJob(Work):
    """One variant to be measured by any idle device of a class with these instruction sets. That device is its runner.

    ``heartbeat_at`` is when it was last offered, or failed.
    """

    variant = models.ForeignKey(Variant, on_delete=models.CASCADE, related_name="profiling_jobs")
    device_class = models.CharField(max_length=64)
    isa = models.CharField(max_length=100)
    device = models.ForeignKey("fleet.Device", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")
    samples_digest = models.CharField(max_length=64, blank=True, help_text="what the device measures accuracy on")
    failures = models.PositiveIntegerField(default=0, help_text="results without numbers, since it was last asked for")

    class Meta:
        ordering = ("id",)
        constraints = [
            models.UniqueConstraint(fields=("variant", "device_class", "isa"), name="one_profiling_job_per_place")
        ]

    @property
    def offer_id(self) -> str:
        """What a device calls it: another each time that it is offered."""
        return f"{self.pk}-{self.attempts}"
