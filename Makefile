# Everything here does its own set-up: a virtual environment in .venv, with what constraints.txt pins.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# named after what it was made from, so that a change of either file makes a new one
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
INTERPRETED := $(wildcard tests/kernels/test_interp_*.py)

.PHONY: help demo test check compile-matrix hooks format regen clean

help:
	@echo "make demo    compile the shipped specs and the README's, run them, show the errors against the reference"
	@echo "make test    the test suite, without a GPU, in less than half an hour on two cores"
	@echo "make check   lint, format, types, what must not occur, and the checked-in generated/ files"
	@echo "make compile-matrix  the kernels compiled by other releases of Triton, which it installs: TRITONS='3.6.0 3.9.0'"
	@echo "make hooks   have git run the same before each commit"
	@echo "make format  format the sources"
	@echo "make regen   write generated/ anew"
	@echo "make clean   remove .venv and what builds and tests leave"

demo: $(STAMP)
	@$(BIN)/python -m flagen demo

# Two processes: Triton decides at its import whether it interprets kernels or compiles them. The compiled one comes last,
# so that its summary closes the output; the status is that of the first failure.
test: $(STAMP)
	@status=0; \
	if [ -n "$(INTERPRETED)" ]; then TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED) || status=$$?; fi; \
	env -u TRITON_INTERPRET $(PYTEST) || { code=$$?; [ $$status -ne 0 ] || status=$$code; }; \
	exit $$status

# the commands of .pre-commit-config.yaml, in the same order
check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tests/bans.py
	$(BIN)/python -m flagen regen --check

# hours, and downloads: not a part of `make test`. CASES chooses some, as pytest's -k: CASES='gla and sm_90'
compile-matrix: $(STAMP)
	$(BIN)/python tests/triton_versions.py $(TRITONS) $(if $(CASES),-k "$(CASES)")

hooks: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt 'pre-commit >= 4'
	$(BIN)/pre-commit install

format: $(STAMP)
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

regen: $(STAMP)
	$(BIN)/python -m flagen regen

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flagen needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(CI),--quiet) --disable-pip-version-check -c constraints.txt -e '.[test]'
	@rm -f $(VENV)/.ready-*
	@touch $@
