#!/usr/bin/env bash
# Makes .venv when it is missing and installs one pinned requirement file into it. Says what to do when it cannot.
set -euo pipefail
python=${1:-} file=$2

fail() { printf 'cannot set up: %s\n' "$*" >&2; exit 1; }

# A name on the PATH is not yet a Python: version managers leave commands there that only print advice.
runs_here() { "$1" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

if [ ! -x .venv/bin/python ]; then
  if [ -n "$python" ]; then
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
      fail "$python is $("$python" --version 2>&1 | head -n 1); Python 3.11, 3.12 or 3.13 is needed; name one with: make PYTHON=/path/to/python3.12 ..."
  else
    for name in python3.13 python3.12 python3.11 python3 python; do
      if runs_here "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || fail "no Python 3.11, 3.12 or 3.13 with its venv module found (Debian: apt-get install python3 python3-venv); name one with: make PYTHON=/path/to/python3.12 ..."
  fi
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv ||
    { rm -rf .venv; fail "the venv module is missing; install it (Debian: apt-get install python3-venv)"; }
fi
.venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  fail ".venv holds $(.venv/bin/python --version); remove the folder .venv and try again with Python 3.11, 3.12 or 3.13"

echo "installing $file"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! .venv/bin/python -m pip install --disable-pip-version-check --quiet --only-binary :all: --no-binary vw-estimators --require-hashes -r "$file" >"$log" 2>&1; then
  tail -n 15 "$log" >&2
  if grep -qiE 'NewConnectionError|Temporary failure|Network is unreachable|Connection refused|ConnectTimeout|Max retries|ProxyError' "$log"; then
    fail "the package index cannot be reached; check the network or the proxy (pip reads HTTPS_PROXY and PIP_INDEX_URL), then run the same command again"
  elif grep -qiE 'No matching distribution|from versions: none' "$log"; then
    fail "a package has no ready-made build for this system; Linux x86-64 or aarch64 with glibc 2.28 or newer is needed (nothing is compiled here, so a compiler would not help)"
  elif grep -qi 'No space left' "$log"; then
    fail "the disk is full; about 1.5 GB is needed for .venv"
  fi
  fail "pip failed as shown above; after mending it run the same command again"
fi
