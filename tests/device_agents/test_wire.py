"""Payloads of released versions stay readable, and what we write stays readable to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from device_agents import wire
from tests.device_agents.conftest import MakeAgent
from tests.device_agents.fake_service import FakeService, desired
from tests.device_agents.models import scaling

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))


def message_of(path: Path) -> type[wire.Message]:
    """golden/check_in.1.0.json is a CheckIn of wire version 1.0."""
    kind: object = getattr(wire, "".join(word.capitalize() for word in path.name.split(".")[0].split("_")))
    assert isinstance(kind, type)
    assert issubclass(kind, wire.Message)
    return kind


def holds(written: Any, golden: Any) -> bool:
    """Whether all that an older reader knows is still there, with the value it had."""
    if isinstance(golden, dict):
        return all(key in written and holds(written[key], value) for key, value in golden.items())
    if isinstance(golden, list):
        return len(written) == len(golden) and all(map(holds, written, golden))
    return bool(written == golden)


def with_more_fields(value: Any) -> Any:
    """The payload as a newer release might send it."""
    if isinstance(value, dict):
        return {key: with_more_fields(item) for key, item in value.items()} | {"from_the_future": [1]}
    return [with_more_fields(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_released_payload_is_read_and_written_with_nothing_lost(path: Path) -> None:
    golden = json.loads(path.read_text(encoding="utf-8"))
    message = message_of(path).model_validate(golden)
    assert holds(json.loads(message.model_dump_json()), golden)


@pytest.mark.parametrize("path", [p for p in GOLDEN if "feedback" not in p.name], ids=lambda path: path.name)
def test_a_payload_of_a_newer_release_is_read_as_what_we_know_of_it(path: Path) -> None:
    golden = json.loads(path.read_text(encoding="utf-8"))
    labels_free = {key: value for key, value in with_more_fields(golden).items() if key not in {"labels", "dropped"}}
    known = {key: value for key, value in golden.items() if key not in {"labels", "dropped"}}
    kind = message_of(path)
    assert kind.model_validate(labels_free) == kind.model_validate(known)


def test_every_message_that_is_sent_has_a_golden_payload() -> None:
    names = {message_of(path).__name__ for path in GOLDEN}
    assert names >= {
        "EnrolmentRequest",
        "EnrolmentReply",
        "CheckIn",
        "CheckInReply",
        "SignedDesired",
        "DesiredState",
        "FeedbackBatch",
        "FeedbackBatchReply",
        "Problem",
        "KeySet",
        "WakeUp",
        "SharedWeights",
    }


def test_the_wire_needs_pydantic_and_the_standard_library_only() -> None:
    source = (Path(wire.__file__)).read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} == {
        "__future__",
        "datetime",
        "enum",
        "typing",
        "pydantic",
    }


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_agent_follows_a_service_of_each_wire_version(
    version: str, make_agent: MakeAgent, service: FakeService
) -> None:
    """What a service of that version leaves out of its replies is missing for real here."""
    model = scaling(2)
    service.offer(model)
    service.want(desired(model, "d1"))
    if version == "1.0":
        service.drops = frozenset({"keys_version", "keys", "spread_s"})
    agent = make_agent()
    agent.enrol()
    agent.work_once()
    assert agent.store.seen_version() == service.version
    identity = agent.store.identity()
    assert identity is not None
    assert identity.keys_version == 0
