"""The demo's commands: `python -m demo --help`. Each reads its own arguments, in its own module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Imported on use: app processes are many and should be small.
COMMANDS = {
    "up": ("demo.supervisor", "run service, devices, apps and simulated users until Ctrl-C"),
    "install": ("demo.installation", "fill a service that runs elsewhere with the demo's applications and models"),
    "check": ("demo.check", "measure whether the six devices differ as the demo promises"),
    "models": ("demo.measure", "measure accuracy and latency of the models"),
    "app": ("demo.app", "one app process with its simulated user (the supervisor starts these)"),
    "proof": ("demo.proof", "fresh demos in turn, measured against what they promise"),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="The whole loop on this machine, and what proves it.",
        epilog="\n".join(f"  {name:<8} {about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m demo COMMAND [--help] ...",
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND", help="one of those below")
    chosen = parser.parse_args(arguments[:1])
    module, _ = COMMANDS[chosen.command]
    code: int = importlib.import_module(module).main(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
