"""The command qoe-agent, as a person or a supervisor runs it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest

from device_agents.__main__ import main, parser
from device_agents.admission import check_inputs
from device_agents.config import AgentConfig
from device_agents.errors import BadConfiguration
from device_agents.inference_protocol import decode_request
from device_agents.listening import bind
from device_agents.runtime import Session
from device_agents.standalone import load
from device_agents.store import Identity, Record, Store
from device_agents.wire import UpdateState
from tests.device_agents.fake_service import desired
from tests.device_agents.models import Model, dense, scaling
from tests.device_agents.serving import client_of

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
BODY = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


@pytest.fixture(autouse=True)
def _own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOE_AGENT_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return scaling(2).write(tmp_path / "twice.onnx")


def test_profile_prints_one_line_of_json(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(model_file), "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)
    assert profile["digest"] == scaling(2).digest
    assert profile["threads"] == 1
    assert profile["a_ms"] >= 0


def test_profile_can_be_read_by_a_person(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(model_file)]) == 0
    told = capsys.readouterr().out
    assert "n rows take" in told
    assert "answer to the golden input: y [1, 4] 0 " in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["profile", "nowhere.onnx"], "no file"),
        (["profile", "."], "is a folder"),
        (["run"], "give --service-url"),
        (["run", "--service-url", "qoe.example.org"], "must begin with https://"),
        (["run", "--service-url", "http://qoe.example.org"], "--allow-plaintext"),
        (["run", "--service-url", "http://127.0.0.1:9"], "--token"),
        (["run", "--port", "99999"], "port"),
        (["run", "--disk-budget-bytes", "0"], "disk_budget_bytes"),
        (["run", "--disk-reserve-bytes", "-1"], "disk_reserve_bytes"),
        (["run", "--spool-budget-bytes", "0"], "spool_budget_bytes"),
        (["run", "--spool-max-age-s", "0"], "spool_max_age_s"),
        (["serve", "--model", "m.onnx", "--queue-requests", "0"], "queue_requests"),
        (["serve", "--model", "m.onnx", "--body-limit-bytes", "0"], "body_limit_bytes"),
        (["serve", "--model", "m.onnx", "--profile-budget-s", "3"], "profile_budget_s"),
        (["status", "--config", "nowhere.toml"], "nowhere.toml"),
        (["status", "--state-dir", "x" * 300], "File name too long"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qoe-agent: ")
    assert says in error


@pytest.mark.parametrize("threads", [0, CORES + 1, 4096])
def test_more_threads_than_cores_are_refused_with_what_is_allowed(
    model_file: Path, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadConfiguration, match=f"--threads {threads}: must be 1 to {CORES}, the cores"):
        load(model_file, model_name="m", config=AgentConfig(), max_batch=1, max_concurrency=1, threads=threads)
    assert main(["profile", str(model_file), "--threads", str(threads)]) == 1
    assert capsys.readouterr().err.startswith(f"qoe-agent: --threads {threads}: must be 1 to {CORES}")


def test_as_many_threads_as_cores_are_served(model_file: Path) -> None:
    load(model_file, model_name="m", config=AgentConfig(), max_batch=1, max_concurrency=1, threads=CORES).close()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(Model(b"junk").write(tmp_path / "junk.onnx"))]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_status_tells_of_a_fresh_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for makes_folder in (False, True):
        if makes_folder:
            Store(tmp_path / "state", disk_budget_bytes=10**6)
        assert main(["status", "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["state_dir"] == str(tmp_path / "state")
        assert status["device_id"] is None
        assert status["running"] is False
        assert status["applications"] == []
        assert main(["status"]) == 0
        assert "device_id: none yet" in capsys.readouterr().out


def test_status_says_whether_an_agent_holds_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "state", disk_budget_bytes=10**6)
    for is_running in (False, True, False):
        if is_running:
            store.lock()
        assert main(["status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["running"] is is_running
        store.unlock()


def test_looking_makes_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert main(["doctor", "--service-url", "http://127.0.0.1:9"]) == 1
    assert not (tmp_path / "state").exists()
    assert f"{tmp_path}/state will be made in {tmp_path}" in capsys.readouterr().out


def test_a_state_folder_that_cannot_be_is_something_to_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    arguments = ["doctor", "--service-url", "http://127.0.0.1:9", "--state-dir", str(tmp_path / "file" / "state")]
    assert main(arguments) == 1
    assert f"{tmp_path}/file is no folder; choose another --state-dir" in capsys.readouterr().out


def test_doctor_says_what_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--service-url", "http://127.0.0.1:9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok   python") for line in lines)
    assert any(line.startswith("MEND service") for line in lines)
    assert any(line.startswith("MEND credential") and "--token" in line for line in lines)


def test_a_credential_is_replaced_and_stays_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "state", disk_budget_bytes=10**6)
    identity = Identity(service_url="https://qoe.example.org", device_id="d-1", credential="old")
    store.save_identity(identity)
    (tmp_path / "secret").write_text("new-credential\n")
    assert main(["credential", "--credential-file", str(tmp_path / "secret")]) == 0
    assert store.identity() == identity.model_copy(update={"credential": "new-credential"})
    assert (tmp_path / "state" / "identity.json").stat().st_mode & 0o777 == 0o600
    assert "new-credential" not in capsys.readouterr().out


@pytest.mark.parametrize(("text", "says"), [("", "1 to 256"), ("x" * 300, "1 to 256"), ("a\nb", "printable")])
def test_a_credential_that_cannot_be_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (tmp_path / "secret").write_text(text)
    command = ["credential", "--credential-file", str(tmp_path / "secret")]
    assert main(command) == 1
    assert "no device is enrolled" in capsys.readouterr().err
    store = Store(tmp_path / "state", disk_budget_bytes=10**6)
    store.save_identity(Identity(service_url="https://qoe.example.org", device_id="d-1", credential="old"))
    assert main(command) == 1
    assert says in capsys.readouterr().err


@pytest.fixture
def serving(model_file: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The stand-alone server as a process of its own."""
    arguments = [sys.executable, "-m", "device_agents", "serve", "--model", str(model_file), "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    with client_of(line.split(" at ")[1].split("/v2")[0]) as client:
        yield process, client
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_file_is_served_without_a_service_and_stops_cleanly_on_a_signal(
    serving: tuple[subprocess.Popen[str], httpx.Client],
) -> None:
    process, client = serving
    reply = client.post("/v2/models/twice/infer", json=BODY)
    assert reply.json()["outputs"][0]["data"] == [2, 4, 6, 8]
    assert "X-Decision-Id" not in reply.headers
    assert client.post("/feedback", json={"decision_id": "d", "rating": 1}).status_code == 404
    started_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert time.monotonic() - started_s < 5


def test_a_restarted_device_serves_before_it_can_enrol(tmp_path: Path) -> None:
    model = scaling(2)
    store = Store(tmp_path / "state", disk_budget_bytes=10**6)
    model.write(store.artifact(model.digest))
    record = Record(
        application="digits", model_name="digits", state=UpdateState.COMMITTED, committed=desired(model, "d1")
    )
    store.save_record(record)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    arguments = [
        sys.executable,
        "-m",
        "device_agents",
        "run",
        "--service-url",
        "http://127.0.0.1:9",
        "--port",
        str(port),
    ]
    process = subprocess.Popen([*arguments, "--token", "a-token-of-some-length"], stderr=subprocess.DEVNULL)
    try:
        with client_of(f"http://127.0.0.1:{port}") as client:
            assert _first_answer(client)["outputs"][0]["data"] == [2, 4, 6, 8]
    finally:
        process.kill()
        process.wait()


def _first_answer(client: httpx.Client) -> Any:
    for _ in range(200):
        with contextlib.suppress(httpx.ConnectError):
            return client.post("/v2/models/digits/infer", json=BODY).raise_for_status().json()
        time.sleep(0.1)
    raise AssertionError("the agent does not serve")


def test_the_example_of_the_readme_fits_the_demo_s_model() -> None:
    readme = (ROOT / "device_agents" / "README.md").read_text()
    (program,) = re.findall(r"python3 -c '(.+)' \|", readme)
    body = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    session = Session(ROOT / "demo" / "models" / "digits-small.onnx", threads=1)
    request = decode_request(body, json_size=None, inputs=session.inputs)
    assert check_inputs(request.inputs, session) == 1


def test_the_unit_of_the_readme_starts_the_agent_with_settings_that_exist_whatever_the_network_does() -> None:
    readme = (ROOT / "device_agents" / "README.md").read_text()
    (unit,) = re.findall(r"```ini\n(.+?)```", readme, re.DOTALL)
    (start,) = re.findall(r"ExecStart=\S+/qoe-agent (.+)", unit)
    options = parser().parse_args(start.split())
    (example,) = re.findall(r"```toml\n(.+?)```", readme, re.DOTALL)
    settings = set(re.findall(r"QOE_AGENT_(\w+)", unit)) | set(tomllib.loads(example))
    assert options.config == Path("/etc/qoe-agent.toml")
    assert {name.lower() for name in settings} <= set(AgentConfig.model_fields)
    assert "network-online" not in unit


def test_every_setting_has_a_flag_and_serving_one_file_shows_those_that_matter_to_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {setting: f"--{setting.replace('_', '-')}" for setting in AgentConfig.model_fields} | {"labels": "--label"}
    shown: dict[str, set[str]] = {}
    for command in ("run", "serve", "profile"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = set(capsys.readouterr().out.split())
        shown[command] = {setting for setting, flag in flags.items() if flag in told}
    assert shown["run"] == set(AgentConfig.model_fields)
    assert {"queue_requests", "body_limit_bytes", "profile_budget_s"} <= shown["serve"]
    assert shown["profile"] == {"cpu_quota_emulated", "log_level"}


@pytest.mark.parametrize("command", ["run", "enrol", "serve", "profile", "status", "credential", "doctor"])
def test_help_of_each_command_says_what_it_does_and_shows_the_settings_that_matter_to_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert "QOE_AGENT_<SETTING>" in told
    assert ("--service-url" in told) == (command not in {"serve", "profile"})


def test_a_model_with_its_weights_beside_it_is_served_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outside.onnx"
    model = onnx.load_from_string(dense(width=64, layers=1).content)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert main(["profile", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a_ms"] >= 0
    (tmp_path / "weights.bin").unlink()
    assert main(["profile", str(path)]) == 1
    assert "cannot be loaded" in capsys.readouterr().err
