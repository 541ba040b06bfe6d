# On a machine with Python 3.11 or newer, git and make: `make train`, `make test`, `make stories`.

PYTHON ?= python3
BIN := .venv/bin
# One rank per GPU; two ranks on the CPU where there is none.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

.PHONY: train test stories check clean

train: .venv/.installed
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m ddptrain experiment=digits $(ARGS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Most of what is promised, once.
test: check
	$(PYTEST) -m "not long" $(ARGS)

# The rest, and the same through more launchers, signals and losses: up to minutes each.
stories: check
	$(PYTEST) -m long $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamps make a second call start at once; a change of pyproject.toml installs again.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "building .venv; downloading torch may take some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
