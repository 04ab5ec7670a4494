"""The command ``qoe-agent``: reads settings, puts the parts together, and says plainly what went wrong."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import device_agents.lean  # noqa: F401 - before all that it keeps from loading more than is used
from device_agents.accuracy import accuracy
from device_agents.config import AgentConfig, load_config
from device_agents.errors import AgentError, BadConfiguration
from device_agents.listening import QuietServer, bind
from device_agents.server import InferenceServer
from device_agents.standalone import load, profile
from device_agents.version import agent_version
from device_agents.wire import GoldenOutput

logger = logging.getLogger("qoe_agent")

LONGEST_CREDENTIAL, SHOWN_VALUES = 256, 5
EXAMPLES = """\
examples:
  qoe-agent run --service-url https://qoe.example.org --token TOKEN   first start: the token is needed once
  qoe-agent run --config /etc/qoe-agent.toml                          every later start
  qoe-agent serve --model model.onnx --max-batch 8                    without any service
  qoe-agent doctor                                                    what is missing, and what to do about it

The model is served at http://127.0.0.1:8600/v2/models/NAME (Open Inference Protocol v2). Everything that must survive
a restart is in the state folder (--state-dir). Exit status: 0; 1 with one line on standard error; 2 for wrong flags.
"""
MEASURING = frozenset({"cpu_quota_emulated", "log_level"})
SERVING = MEASURING | {"host", "port", "body_limit_bytes", "queue_requests", "profile_budget_s"}
WITHOUT_SERVICE = {"serve": SERVING, "profile": MEASURING}
SETTINGS = "also in the TOML file, and as QOE_AGENT_<SETTING> or QOE_AGENT_<SETTING>_FILE; a flag wins over both"

FLAGS = (
    ("--service-url", "service_url", str),
    ("--token", "token", str),
    ("--name", "name", str),
    ("--device-class", "device_class", str),
    ("--state-dir", "state_dir", Path),
    ("--host", "host", str),
    ("--port", "port", int),
    ("--ca-bundle", "ca_bundle", str),
    ("--disk-budget-bytes", "disk_budget_bytes", int),
    ("--disk-reserve-bytes", "disk_reserve_bytes", int),
    ("--spool-budget-bytes", "spool_budget_bytes", int),
    ("--spool-max-age-s", "spool_max_age_s", float),
    ("--queue-requests", "queue_requests", int),
    ("--body-limit-bytes", "body_limit_bytes", int),
    ("--profile-budget-s", "profile_budget_s", float),
    ("--cpu-quota-emulated", "cpu_quota_emulated", float),
    ("--log-level", "log_level", str),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, or 1 with one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        config = _config(options)
        _log_to_stderr(config)
        return int(options.command(config, options))
    except (AgentError, OSError) as error:
        _say(f"qoe-agent: {error}", to_error=True)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="qoe-agent",
        description="Runs the model that the service chose for this device, and tells the service how it does.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands (each has a --help of its own)")
    _command(commands, "run", _run, "serve and follow the service; enrols first when given a token")
    _command(commands, "enrol", _enrol, "trade an enrolment token for this device's credential, and end")
    serve = _command(commands, "serve", _serve, "serve one ONNX file without any service")
    serve.add_argument("--model", required=True, type=Path, metavar="FILE", help="the ONNX file")
    serve.add_argument(
        "--model-name", default="", metavar="NAME", help="its name in the address; default: the file's name"
    )
    serve.add_argument("--max-batch", type=int, default=8, metavar="ROWS", help="largest batch (default 8)")
    serve.add_argument("--concurrency", type=int, default=1, metavar="RUNS", help="runs at once (default 1)")
    serve.add_argument(
        "--threads", type=int, default=1, metavar="NUMBER", help="threads per run, at most the cores (default 1)"
    )
    serve.add_argument(
        "--slo-ms", type=float, metavar="MS", help="answer 95 of 100 within this; batch and concurrency then adapt"
    )
    measure = _command(commands, "profile", _profile, "measure one ONNX file on this device")
    measure.add_argument("file", type=Path, metavar="FILE")
    measure.add_argument(
        "--threads", type=int, default=1, metavar="NUMBER", help="threads per run, at most the cores (default 1)"
    )
    measure.add_argument("--samples", type=Path, metavar="NPZ", help="also measure accuracy, on samples of the service")
    measure.add_argument("--json", action="store_true", help="print one line of JSON")
    look = _command(commands, "status", _status, "what the agent of this state folder does")
    look.add_argument("--json", action="store_true", help="print one line of JSON")
    renew = _command(commands, "credential", _credential, "replace the credential by one that the operator issued anew")
    renew.add_argument(
        "--credential-file", type=Path, metavar="FILE", help="file that holds it; default: standard input"
    )
    _command(commands, "doctor", _doctor, "check what the agent needs, and say what to mend")
    return top


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=f"{help_text}.")
    command.set_defaults(command=run)
    settings = command.add_argument_group("settings", SETTINGS)
    settings.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    for flag, setting, kind in FLAGS:
        # All are taken everywhere, so that one set of settings fits all commands; shown is what matters to this one.
        text = _explained(setting) if setting in WITHOUT_SERVICE.get(name, {setting}) else argparse.SUPPRESS
        settings.add_argument(flag, dest=setting, type=kind, metavar=_unit(kind), help=text)
    label = "a label; may be repeated" if name not in WITHOUT_SERVICE else argparse.SUPPRESS
    settings.add_argument("--label", action="append", metavar="KEY=VALUE", help=label)
    plaintext = "allow http:// to other machines than this" if name not in WITHOUT_SERVICE else argparse.SUPPRESS
    settings.add_argument("--allow-plaintext", action="store_true", default=None, help=plaintext)
    return command


def _unit(kind: type) -> str:
    return {int: "NUMBER", float: "NUMBER", Path: "FOLDER"}.get(kind, "TEXT")


def _explained(setting: str) -> str:
    """What a setting is for, and what it is when nobody says."""
    field = AgentConfig.model_fields[setting]
    default = field.get_default(call_default_factory=True)
    return f"{field.description or setting}{f' (default {default})' if default else ''}".replace("%", "%%")


def _config(options: argparse.Namespace) -> AgentConfig:
    settings = [setting for _, setting, _ in FLAGS]
    flags = {setting: getattr(options, setting) for setting in settings}
    flags |= {"allow_plaintext": options.allow_plaintext, "labels": ",".join(options.label) if options.label else None}
    path = options.config or (Path(named) if (named := os.environ.get("QOE_AGENT_CONFIG")) else None)
    return load_config(path=path, environment=os.environ, flags=flags)


# -- commands ----------------------------------------------------------------------------------------------------------


def _run(config: AgentConfig, _: argparse.Namespace) -> int:
    from device_agents.agent import Agent  # noqa: PLC0415 - megabytes that serving one file does not need

    with bind(config.host, config.port) as listener, Agent(config) as agent:
        agent.serving_url = _address(listener.getsockname())
        agent.boot()
        if not agent.is_enrolled and not agent.executors:
            agent.enrol_until_done()  # with nothing to serve yet, there is nothing else to do
        app = InferenceServer(
            agent.executors,
            version=agent_version(),
            body_limit_bytes=config.body_limit_bytes,
            accept_feedback=agent.accept_feedback,
        )
        server = QuietServer(app, sockets=[listener])
        agent.store.save_status({"serving_url": agent.serving_url, "started_at": time.time()})
        if agent.is_enrolled:
            agent.start()
        else:
            agent.start_once_enrolled()
        logger.info("serving url=%s device=%s", agent.serving_url, config.name)
        server.serve_until_stopped()
    return 0


def _enrol(config: AgentConfig, _: argparse.Namespace) -> int:
    from device_agents.agent import Agent  # noqa: PLC0415 - megabytes that serving one file does not need

    with Agent(config) as agent:
        if agent.is_enrolled:
            raise BadConfiguration(f"already enrolled; remove {config.state_dir}/identity.json to enrol anew")
        _say(f"enrolled as {agent.enrol().device_id}")
    return 0


def _credential(config: AgentConfig, options: argparse.Namespace) -> int:
    from device_agents.store import Store  # noqa: PLC0415 - megabytes that serving one file does not need

    store = Store(config.state_dir, disk_budget_bytes=config.disk_budget_bytes)
    identity = store.identity()
    if identity is None:
        raise BadConfiguration(f"no device is enrolled in {config.state_dir}: give --token to qoe-agent enrol")
    credential = _secret(options.credential_file)
    if (
        not credential
        or len(credential) > LONGEST_CREDENTIAL
        or not credential.isascii()
        or not credential.isprintable()
    ):
        raise BadConfiguration(f"credential: must be 1 to {LONGEST_CREDENTIAL} printable ASCII characters")
    store.save_identity(identity.model_copy(update={"credential": credential}))
    _say(f"{identity.device_id} has a new credential; a running agent takes it up by itself")
    return 0


def _secret(path: Path | None) -> str:
    """From a file or standard input: an argument would be seen by every user of the host."""
    try:
        return (path.read_text(encoding="utf-8") if path is not None else sys.stdin.read()).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"credential: {error}") from error


def _serve(config: AgentConfig, options: argparse.Namespace) -> int:
    name = options.model_name or options.model.stem
    executor = load(
        options.model,
        model_name=name,
        config=config,
        max_batch=options.max_batch,
        max_concurrency=options.concurrency,
        threads=options.threads,
        slo_p95_ms=options.slo_ms,
    )
    with bind(config.host, config.port) as listener:
        app = InferenceServer({name: executor}, version=agent_version(), body_limit_bytes=config.body_limit_bytes)
        server = QuietServer(app, sockets=[listener])
        _say(f"serving {name} at {_address(listener.getsockname())}/v2/models/{name}")
        server.serve_until_stopped()
    executor.close()
    return 0


def _profile(config: AgentConfig, options: argparse.Namespace) -> int:
    report = profile(options.file, threads=options.threads, config=config)
    right = accuracy(options.file, options.samples, threads=options.threads) if options.samples else None
    if options.json:
        found = report.model_dump(mode="json") | ({"accuracy": right.model_dump(mode="json")} if right else {})
        _say(json.dumps(found))
        return 0
    _say(f"{options.file.name}: n rows take {report.a_ms:.3f} ms * n + {report.b_ms:.3f} ms, r2 {report.r2:.3f}")
    _say(f"threads {report.threads}, load {report.load_ms:.0f} ms, memory {report.memory_bytes / 2**20:.1f} MiB")
    _say(f"CPU {report.cpu_ms_per_row:.3f} ms per row, sha256 {report.digest}")
    _say(f"answer to the golden input: {_shown(report.golden)}")
    if right is not None:
        share = right.value if right.correct is None else right.correct / right.samples
        _say(f"accuracy {share:.3f} ({right.kind}) on {right.samples} samples")
    return 0


def _shown(golden: GoldenOutput | None) -> str:
    """The first values of each output."""
    if golden is None:
        return "never twice the same"
    outputs = ((each, " ".join(f"{value:g}" for value in each.values[:SHOWN_VALUES])) for each in golden.outputs)
    return "; ".join(f"{each.name} {list(each.shape)} {values}".rstrip() for each, values in outputs)


def _status(config: AgentConfig, options: argparse.Namespace) -> int:
    from device_agents.inspection import status  # noqa: PLC0415 - megabytes that serving one file does not need

    found = status(config)
    if options.json:
        _say(json.dumps(found))
        return 0
    for key, value in found.items():
        _say(f"{key}: {json.dumps(value) if isinstance(value, dict | list) else _in_words(value)}")
    return 0


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none yet" if value in (None, "") else str(value)


def _doctor(config: AgentConfig, _: argparse.Namespace) -> int:
    from device_agents.inspection import examine  # noqa: PLC0415 - megabytes that serving one file does not need

    findings = examine(config)
    for finding in findings:
        _say(f"{'ok  ' if finding.is_ok else 'MEND'} {finding.what}: {finding.detail}")
    return 0 if all(finding.is_ok for finding in findings) else 1


# -- plumbing ----------------------------------------------------------------------------------------------------------


def _address(name: Any) -> str:
    host, port = name[0], name[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr(config: AgentConfig) -> None:
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    for noisy in ("httpx", "httpcore", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _say(text: str, *, to_error: bool = False) -> None:
    (sys.stderr if to_error else sys.stdout).write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
