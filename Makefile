# `make demo`, `make demo-speech` and `make test` do everything on a fresh machine: environment,
# install, and the job.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEVICE ?= cuda
export DEVICE

.PHONY: demo demo-speech test gpu lint docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/fedpriv run configs/vit_digits.yaml

demo-speech: install
	$(BIN)/fedpriv run configs/asr_digits.yaml

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# On a machine with an NVIDIA GPU, or DEVICE=cpu, small, on any: see docs/gpu.md.
gpu:
	bash simulations/benchmarks/gpu.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, into build/site; any warning is an error.
docs: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
