# Everything a newcomer needs. Each target makes .venv when it is missing, and is quick when it exists.
#   make run     the whole loop: service, six agents, apps with simulated users   (PORT=8000, FRESH=1 to start over)
#   make test    all tests
#   make check   lint, types, import contracts, migrations
#   make bench   every benchmark in quick form   (make bench-peers first, to measure peers beside ours)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test check bench bench-peers requirements clean

PORT ?= 8000
FRESH ?=
PYTHON ?=
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE ?=

help:
	@sed -n 's/^#   //p' Makefile

run: .venv/.installed-run
	@echo "packages ready"
	@exec $(BIN)/python -m demo up --port $(PORT) $(if $(FRESH),--fresh)

test: .venv/.installed-dev
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -q

check: .venv/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy .
	@$(BIN)/lint-imports
	@$(BIN)/python manage.py makemigrations --check --dry-run

bench: .venv/.installed-dev
	@for question in $$(sed -n 's/^- `python -m benchmarks\.\([a-z_]*\)`.*/\1/p' benchmarks/README.md); do \
		$(BIN)/python -m benchmarks.$$question --quick; done

# Other servers, each in an environment of its own; what does not install is named and left out.
bench-peers: .venv/.installed-dev
	@bash benchmarks/peers.sh

# Pins every dependency with its hashes. Needs uv.
requirements:
	uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header -o requirements/run.txt
	uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header -c requirements/run.txt -o requirements/dev.txt
	uv pip compile --quiet device_agents/pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header -c requirements/run.txt -o requirements/agent.txt

clean:
	rm -rf .venv var .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/.installed-%: requirements/%.txt
	@bash requirements/install.sh "$(PYTHON)" $<
	@touch $@
