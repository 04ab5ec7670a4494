"""The Catalogue page: what is measured where, what beats what, and the buttons that change it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from qoe_service.catalogue import retirement
from qoe_service.catalogue.models import Application, Job, ProfilingJob, Upload, Variant
from qoe_service.decisions.models import Ban
from qoe_service.fleet.models import AuditEntry, Device
from tests import builders
from tests.builders import NOW
from tests.web.reading import fragment, text_of

pytestmark = pytest.mark.django_db
PATH = "/applications/digits/catalogue/"


@pytest.fixture
def family() -> Application:
    """Three variants: one good, one beaten by it on tablets, one measured on the server only."""
    application = builders.make_application()
    tablet = builders.make_device("tab", device_class="tablet")
    base = builders.make_variant(application, "wide", size_bytes=4_000_000, accuracy=0.9)
    small = builders.make_variant(
        application, "wide-int8", base=base, size_bytes=1_000_000, accuracy=0.9, compression_pass="static-int8"
    )
    builders.make_variant(application, "student", base=base, accuracy=0.95)
    for variant, a_ms in ((base, 8.0), (small, 2.0)):
        builders.make_profile(variant, tablet, a_ms=a_ms, b_ms=0, cpu_ms_per_row=a_ms)
        builders.make_profile(variant, a_ms=1.0, b_ms=0)
    return application


def press(client: Client, do: str, **fields: str) -> str:
    answer = client.post(PATH, {"do": do, **fields})
    assert answer.status_code == 302, answer.content
    return text_of(client.get(PATH))


def test_a_new_application_says_how_to_begin(operator: Client) -> None:
    builders.make_application()
    page = text_of(operator.get(PATH))
    for shown in (
        "No variant yet",
        "manage.py import_model digits MODEL.onnx",
        "No job yet",
        "Nothing was uploaded yet",
    ):
        assert shown in page, shown
    assert json.loads(operator.get("/applications/digits/catalogue.json").content)["data"] == []


def test_each_variant_shows_what_was_measured_on_the_class_that_is_looked_at(
    operator: Client, family: Application
) -> None:
    page = text_of(operator.get(f"{PATH}?class=tablet"))
    assert "3 in use · 1 on the front for tablet" in page
    assert "static-int8 from wide 1.00 MB 25 % of its base 90.0 % 88.0 % to 92.0 % 2.00 ms 2.00 ms of CPU" in page
    assert "dominated no more accurate and 4.0 times slower and 4.0 times larger than wide-int8" in page
    assert "student fp32 trained elsewhere from wide" in page
    assert "not measured not measured on tablet" in page
    assert "not measured accuracy not measured" not in page, "the server has the tablets' instruction sets"
    on_server = text_of(operator.get(PATH))
    assert "1 request, server" in on_server
    assert "90.0 % 88.0 % to 92.0 % 1.00 ms on the front" in on_server


def test_an_accuracy_without_labels_says_what_it_is_instead(operator: Client, family: Application) -> None:
    Variant.objects.filter(name="wide").update(details={"accuracy": {"kind": "agreement"}})
    page = text_of(operator.get(PATH))
    assert "88.0 % to 92.0 % agreement with the base model" in page


def test_a_number_of_a_replaced_data_set_says_so(operator: Client, family: Application) -> None:
    assert "former data set" not in text_of(operator.get(PATH))
    Variant.objects.filter(name="wide").update(details={"accuracy": {"kind": "top-1", "dataset": "f" * 64}})
    page = text_of(operator.get(PATH))
    assert page.count("88.0 % to 92.0 % on the former data set") == 1
    assert "on the former data set" in text_of(operator.get("/applications/digits/"))
    retirement.retire(variant=Variant.objects.get(name="wide"), actor="ada", now=NOW)
    assert "90.0 % on the former data set · retired" in text_of(operator.get(PATH))


def test_a_variant_shows_where_it_can_be_cut_or_why_nowhere(operator: Client, family: Application) -> None:
    first = {"tensor": "pool", "dtype": "uint8", "shape": [128], "bytes": 128, "flops_before": 1e6, "flops_after": 3e6}
    second = {**first, "tensor": "rows", "bytes": 64, "flops_before": 3e6, "flops_after": 1e6}
    Variant.objects.filter(name="wide-int8").update(details={"cuts": [first, second]})
    Variant.objects.filter(name="wide").update(details={"cuts": [], "no_cuts_because": "models of 2 GiB are not cut"})
    page = text_of(operator.get(PATH))
    assert "pool 128 B uint8, after 25 % of the work rows 64 B uint8, after 75 % of the work" in page
    assert "Where it can be cut in two Nowhere: models of 2 GiB are not cut" in page


def test_the_scatter_has_the_front_and_the_dominated_with_their_intervals(
    operator: Client, family: Application
) -> None:
    figure = json.loads(operator.get("/applications/digits/catalogue.json?class=tablet").content)
    front, best, beaten = figure["data"]
    assert (front["x"], front["y"]) == ([2.0], [0.9])
    assert (best["name"], best["text"]) == ("On the front", ["wide-int8"])
    assert (beaten["name"], beaten["text"], beaten["x"]) == ("Dominated", ["wide"], [8.0])
    assert best["error_y"]["array"] == [0.02]
    assert "4.0 times slower" in beaten["customdata"][0]
    unknown = json.loads(operator.get("/applications/digits/catalogue.json?class=nothing").content)
    assert unknown["layout"]["xaxis"]["title"]["text"] == "One request on server, ms"


def test_variants_are_retired_restored_banned_and_unbanned_by_name(operator: Client, family: Application) -> None:
    assert "wide-int8 is retired" in press(operator, "retire:wide-int8")
    assert not Variant.objects.get(name="wide-int8").is_selectable
    assert "1 retired" in text_of(operator.get(PATH))
    assert "wide-int8 may be chosen again" in press(operator, "restore:wide-int8")
    assert "student is banned on every device" in press(operator, "ban:student")
    ban = Ban.objects.get()
    assert (ban.device, ban.reason) == (None, "by ada")
    assert "banned by ada" in text_of(operator.get(PATH))
    assert "The ban is lifted" in press(operator, f"lift:{ban.pk}")
    verbs = list(AuditEntry.objects.order_by("pk").values_list("actor", "verb"))
    assert verbs == [("ada", verb) for verb in ("retire_variant", "restore_variant", "ban", "lift_ban")]


def test_passes_are_queued_cancelled_and_run_again(operator: Client, family: Application) -> None:
    assert "1 job is queued for wide" in press(operator, "compress:wide", passes="static-int8")
    job = Job.objects.get()
    assert "The job is cancelled" in press(operator, f"cancel-job:{job.pk}")
    assert "The job is queued again" in press(operator, f"run-again:{job.pk}")
    assert Job.objects.get().state == "queued"


@pytest.mark.parametrize(
    ("do", "told"),
    [
        ("", "there are retire, restore"),
        ("retire:nobody", "has no variant"),
        ("cancel-job:x", "must be a number"),
        ("run-again:999", "no job 999"),
        ("compress:wide", "no such pass"),
        ("cancel-upload:none", "no upload"),
    ],
)
def test_what_cannot_be_done_is_told_on_the_page(operator: Client, family: Application, do: str, told: str) -> None:
    assert told in press(operator, do)


def test_the_safe_baseline_cannot_be_retired(operator: Client, family: Application) -> None:
    Application.objects.update(baseline_digest=Variant.objects.get(name="wide").artifact_id)
    assert "wide is the safe baseline" in press(operator, "retire:wide")
    assert Variant.objects.get(name="wide").retired_at is None


def test_uploads_and_jobs_show_how_they_stand_and_why_they_ended(operator: Client, family: Application) -> None:
    now = timezone.now()
    states: list[tuple[str, dict[str, Any]]] = [
        ("receiving", {"received_bytes": 500_000}),
        ("refused", {"error": "it is <odd>"}),
    ]
    for state, fields in states:
        Upload.objects.create(
            id=state.ljust(32, "0"),
            application=family,
            kind="model",
            file_name=f"{state}.onnx",
            size_bytes=1_000_000,
            state=state,
            created_at=now,
            touched_at=now,
            **fields,
        )
    base = Variant.objects.get(name="wide")
    first = Job.objects.create(application=family, base=base, compression_pass="prune", created_at=now)
    Job.objects.create(application=family, base=base, after=first, compression_pass="static-int8", created_at=now)
    page = text_of(operator.get(PATH))
    assert "receiving.onnx model · 1.00 MB 500 kB of 1.00 MB Cancel receiving.onnx" in page
    assert "refused it is <odd>" in page
    assert f"static-int8 of wide · waits for job {first.pk} queued Cancel" in page
    assert "2 waiting" in page
    assert "The upload is cancelled" in press(operator, f"cancel-upload:{'receiving'.ljust(32, '0')}")


def test_the_live_part_costs_nothing_while_nothing_changes(operator: Client, family: Application) -> None:
    etag = fragment(operator, PATH).headers["ETag"]
    assert fragment(operator, PATH, etag).status_code == 304
    Variant.objects.filter(name="student").update(accuracy=0.5)
    assert fragment(operator, PATH, etag).status_code == 200


def test_queries_do_not_grow_with_variants_and_classes(operator: Client) -> None:
    application = builders.make_application()
    counts = []
    for number in range(3):
        base = builders.make_variant(application, f"base-{number}")
        variant = builders.make_variant(application, f"v-{number}", base=base)
        builders.make_profile(variant, builders.make_device(f"n-{number}", device_class=f"class-{number}"))
        with CaptureQueriesContext(connection) as queries:
            fragment(operator, PATH)
        counts.append(len(queries))
    assert len(set(counts)) == 1
    assert counts[0] <= 16


def test_buttons_need_the_token_of_the_page(family: Application) -> None:
    client = Client(enforce_csrf_checks=True)
    assert client.post(PATH, {"do": "retire:wide"}).status_code == 403
    assert Variant.objects.get(name="wide").retired_at is None


@pytest.fixture
def board(family: Application) -> Device:
    """A device of another kind than the server and the tablets, which runs the application."""
    hardware = {"architecture": "aarch64", "isa": ["neon", "neon-dot"]}
    board = builders.make_device("board-1", device_class="board", hardware=hardware)
    builders.make_assignment(board, family)
    return board


def test_other_instruction_sets_show_nothing_until_a_device_of_them_has_measured(
    operator: Client, family: Application, board: Device
) -> None:
    page = text_of(operator.get(f"{PATH}?class=board"))
    assert "3 in use · 0 on the front for board" in page
    assert "not measured not measured not measured on board" in page
    assert "board aarch64 neon-dot not measured accuracy not measured" in page

    variant = Variant.objects.get(name="wide")
    job = ProfilingJob.objects.create(
        variant=variant, device_class="board", isa="aarch64 neon-dot", device=board, state="running", created_at=NOW
    )
    page = text_of(operator.get(f"{PATH}?class=board"))
    assert "board aarch64 neon-dot measuring on board-1 accuracy not measured Cancel measuring wide on board" in page

    job.state, job.error = "failed", "no room for 4000000 bytes"
    job.save()
    page = text_of(operator.get(f"{PATH}?class=board"))
    assert "not measured accuracy not measured no room for 4000000 bytes Measure again : wide on board" in page

    builders.make_profile(variant, board, a_ms=21.0, b_ms=0, load_ms=30.0)
    page = text_of(operator.get(f"{PATH}?class=board"))
    assert "accuracy not measured on aarch64 neon-dot" in page, "a time alone makes no front"
    family.samples = variant.artifact
    family.save()
    builders.make_isa_accuracy(variant, board, value=0.7, low=0.6, high=0.8)
    page = text_of(operator.get(f"{PATH}?class=board"))
    assert "3 in use · 1 on the front for board" in page
    assert "21.0 ms a request, loaded in 30.0 ms board-1, 1 Jun 2026 12:00" in page
    assert "70.0 % accurate, 60.0 % to 80.0 % 200 samples, board-1, 1 Jun 2026 12:00" in page


def test_a_class_of_two_kinds_of_devices_is_two_places(operator: Client, family: Application, board: Device) -> None:
    other = builders.make_device("board-2", device_class="board", hardware={"architecture": "x86_64", "isa": ["avx2"]})
    builders.make_assignment(other, family)
    page = operator.get(f"{PATH}?class=board · x86_64 avx2")
    assert "1 request, board · x86_64 avx2" in text_of(page)
    assert "<option>board · aarch64 neon-dot</option>" in page.content.decode()


def test_the_gate_is_opened_and_shut_and_jobs_are_stopped_and_run_again(
    operator: Client, family: Application, board: Device
) -> None:
    Application.objects.update(explore_unmeasured=False)
    assert "A class of devices gets it once one of them has measured it" in text_of(operator.get(PATH))
    assert "Devices may try student before anybody" in press(operator, "explore:student")
    assert Variant.objects.get(name="student").explore_unmeasured
    assert "student goes to a class of devices once" in press(operator, "measure-first:student")
    job = ProfilingJob.objects.create(
        variant=Variant.objects.get(name="student"), device_class="board", isa="aarch64 neon-dot", created_at=NOW
    )
    assert "It is measured no more" in press(operator, f"cancel-profiling:{job.pk}")
    assert "The next device of that class that is idle measures it" in press(operator, f"measure-again:{job.pk}")
    assert "no profiling job 999" in press(operator, "measure-again:999")
