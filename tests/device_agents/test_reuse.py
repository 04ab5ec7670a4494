"""What is on the device already is not fetched again; what is damaged, or only claimed, is."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import httpx
import numpy as np
import pytest

from device_agents import reuse
from device_agents.client import ServiceClient
from device_agents.store import Identity
from device_agents.wire import SharedWeights, VariantReference, WeightReference
from tests.device_agents.fake_service import URL, Body

FIRST, SECOND, THIRD = (np.random.default_rng(seed).bytes(700_000) for seed in range(3))
OLD = b"graph of the old one" + FIRST + b"-" + SECOND + b"end"
NEW = b"another graph" + SECOND + b"--" + THIRD + b"..." + FIRST + b"tail"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listed(content: bytes) -> SharedWeights:
    found = [each for each in (FIRST, SECOND, THIRD) if each in content]
    rows = [WeightReference(digest=digest_of(each), offset=content.index(each), size_bytes=700_000) for each in found]
    return SharedWeights(weights=tuple(rows))


class Chunks(Body):
    """Larger ones: these files are not small."""

    CHUNK = 65_536


class Service:
    """Sends ranges of two files, and says which weights they hold; ``cut_after`` breaks the line once."""

    def __init__(self) -> None:
        self.files = {digest_of(each): each for each in (OLD, NEW)}
        self.sent_bytes = 0
        self.ranges: list[str] = []
        self.cut_after = 0
        self.knows_weights = True

    def __call__(self, request: httpx.Request) -> httpx.Response:
        digest, _, rest = request.url.path.removeprefix("/artifacts/sha256/").partition("/")
        content = self.files[digest]
        if rest:
            answer = listed(content).model_dump_json()
            return httpx.Response(200, content=answer) if self.knows_weights else httpx.Response(404)
        span = request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        self.ranges.append(span)
        first, _, last = span.partition("-")
        part = content[int(first) : int(last or len(content) - 1) + 1]
        headers = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
        stream, self.cut_after = Chunks(part, self.cut_after or None), 0
        self.sent_bytes += len(part)
        return httpx.Response(206 if "Range" in request.headers else 200, stream=stream, headers=headers)


@pytest.fixture
def service() -> Service:
    return Service()


def fetch(service: Service, folder: Path, content: bytes) -> int:
    """As an agent does: the part becomes the artifact."""
    identity = Identity(service_url=URL, device_id="device-1", credential="secret")
    client = ServiceClient(URL, identity=identity, transport=httpx.MockTransport(service), rng=random.Random(1))
    digest = digest_of(content)
    variant = VariantReference(digest=digest, name="v", size_bytes=len(content), url=f"/artifacts/sha256/{digest}")
    part = folder / f"{digest}.part"
    fetched = client.download(variant, part, is_cancelled=lambda: False, wait=lambda _: None)
    assert part.read_bytes() == content
    part.rename(part.with_suffix(".onnx"))
    return fetched


def test_weights_that_are_here_are_not_fetched_again(service: Service, tmp_path: Path) -> None:
    assert fetch(service, tmp_path, OLD) == len(OLD)
    fetched = fetch(service, tmp_path, NEW)
    assert fetched == len(NEW) - len(FIRST) - len(SECOND)
    assert service.sent_bytes == len(OLD) + fetched


def test_a_broken_line_is_taken_up_between_what_is_here(service: Service, tmp_path: Path) -> None:
    fetch(service, tmp_path, OLD)
    service.cut_after = 5
    assert fetch(service, tmp_path, NEW) == len(NEW) - len(FIRST) - len(SECOND)


def test_a_download_that_stopped_inside_of_what_is_here_goes_on_there(service: Service, tmp_path: Path) -> None:
    fetch(service, tmp_path, OLD)
    before = NEW.index(SECOND) + 300_000
    (tmp_path / f"{digest_of(NEW)}.part").write_bytes(NEW[:before])
    assert fetch(service, tmp_path, NEW) == len(NEW) - before - 400_000 - len(FIRST)


def test_damaged_weights_on_disk_are_fetched(service: Service, tmp_path: Path) -> None:
    fetch(service, tmp_path, OLD)
    file = tmp_path / f"{digest_of(OLD)}.onnx"
    file.write_bytes(OLD.replace(SECOND, SECOND[:-1] + b"?"))
    assert fetch(service, tmp_path, NEW) == len(NEW) - len(FIRST)


def test_a_list_that_lies_costs_bytes_and_nothing_else(service: Service, tmp_path: Path) -> None:
    fetch(service, tmp_path, OLD)
    forged = WeightReference(digest=digest_of(THIRD), offset=3, size_bytes=700_000)
    reuse.keep(tmp_path, digest_of(OLD), SharedWeights(weights=(forged,)))
    assert fetch(service, tmp_path, NEW) == len(NEW)


def test_a_service_of_before_this_is_asked_for_the_whole(service: Service, tmp_path: Path) -> None:
    service.knows_weights = False
    assert fetch(service, tmp_path, OLD) + fetch(service, tmp_path, NEW) == len(OLD) + len(NEW)
    assert service.ranges == ["0-", "0-"]


def test_the_list_of_an_evicted_variant_goes_with_the_next_look(service: Service, tmp_path: Path) -> None:
    fetch(service, tmp_path, OLD)
    (tmp_path / f"{digest_of(OLD)}.onnx").unlink()
    assert fetch(service, tmp_path, NEW) == len(NEW)
    assert not (tmp_path / f"{digest_of(OLD)}.weights").exists()


def test_of_overlapping_weights_the_first_is_taken(tmp_path: Path) -> None:
    (tmp_path / "old.onnx").write_bytes(FIRST)
    here = WeightReference(digest="a" * 64, offset=0, size_bytes=10)
    reuse.keep(tmp_path, "old", SharedWeights(weights=(here,)))
    rows = [WeightReference(digest="a" * 64, offset=each, size_bytes=10) for each in (5, 0, 20)]
    found = reuse.find(tmp_path, SharedWeights(weights=tuple(rows)))
    assert [(each.start, each.stop) for each in found] == [(0, 10), (20, 30)]
