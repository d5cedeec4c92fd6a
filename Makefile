# Every task of the project, from a fresh clone. Needed: make, Python 3.10 or newer with venv, a C
# compiler (Triton builds its launcher with it) and package indexes that pip can reach.
#
# One virtual environment, .venv, serves every target. torch is nearly all of its size, and the demo
# and the tests should judge the same torch. A target installs only what it adds; stamp files inside
# .venv keep it from doing so twice. Changing constraints.txt starts a fresh environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -qq hides progress and notices; errors still show.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(VENV)/constraints.txt
# The package is installed editable and without an isolated build, which would ignore the pins.
INSTALL_SELF := $(INSTALL) --no-build-isolation
# Workers share the cores between them, so that each is given one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses=4
# Extra arguments: make test ARGS="-k cast", make demo ARGS="--quick", make bench ARGS="--train".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo bench gpu test test-ranks test-trainers test-exhaustive test-random doctest lint docs build compat pictures audit mutants golden c-steps import-time clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 18

demo: $(VENV)/.demo ## Train a small GPT in FP32 and in 16 bits; print a table, write a report.
	$(BIN)/mpcore demo $(ARGS)

bench: $(VENV)/.bench ## Time the optimizer step beside torch's and installed peers; results checked first.
	$(BIN)/mpcore bench $(ARGS)

# No environment: it runs where nothing can be installed, with whatever torch PYTHON has.
gpu: ## Judge and time everything on a GPU, into gpu-results/; without one, rehearse on the CPU.
	$(PYTHON) tests/gpu/run.py --out gpu-results $(ARGS)

test: $(VENV)/.test ## Run the test suite (without the exhaustive tests, and those of ranks and trainers).
	$(PYTEST) $(PARALLEL) -m "not exhaustive and not ranks and not trainers" $(ARGS)

# Each test starts processes of its own.
test-ranks: $(VENV)/.test ## Run the tests of several ranks, and the examples.
	$(PYTEST) -m "ranks and not exhaustive" $(ARGS)

# Models are made of configurations, so that nothing is downloaded: the switch makes sure of it. The
# files are named, so that nothing else is collected.
test-trainers: $(VENV)/.trainers ## Run the tests in Accelerate, Transformers, TRL, PEFT, Lightning, Keras.
	HF_HUB_OFFLINE=1 $(PYTEST) -m trainers $(wildcard tests/test_trainer_*.py) tests/test_trackers.py tests/test_docs.py $(ARGS)

test-exhaustive: $(VENV)/.test ## Run the long, exhaustive tests.
	$(PYTEST) $(PARALLEL) -m exhaustive $(ARGS)

test-random: $(VENV)/.test ## Run the property tests on 1,000 new random examples each.
	$(PYTEST) $(PARALLEL) -m "hypothesis and not exhaustive" --hypothesis-profile=random $(ARGS)

doctest: $(VENV)/.test ## Run the examples of the docstrings, the README and the docs.
	$(PYTEST) tests/test_doctests.py tests/test_docs.py $(ARGS)

lint: $(VENV)/.dev ## Run ruff (lint and format), mypy --strict, and pyright's rules on a user's script.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev ## Build the documentation into site/; warnings are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: $(VENV)/.release ## Build sdist and wheels into dist/; try each outside the repository.
	rm -rf dist
	$(BIN)/python .ci/build_dist.py dist
	$(BIN)/python .ci/check_dist.py dist

# Each argument makes an environment: what it holds beside NumPy, pytest and hypothesis.
VERSIONS ?= "torch==2.13.0 triton==3.9.0" "torch==2.13.0 triton==3.8.0" "torch==2.13.0 triton==3.7.1"
compat: ## Run the core suite with other versions, each in an environment; rows go to docs/versions.md.
	$(PYTHON) .ci/compat.py $(VERSIONS)

pictures: $(VENV)/.demo ## Draw the pictures of README.md anew, into docs/pictures/.
	$(BIN)/python .ci/pictures.py

audit: $(VENV)/.test ## Compile every kernel for four GPUs and judge the machine code.
	$(BIN)/python -m mpcore_audit

mutants: $(VENV)/.test ## Put errors into kernels and engine and see the tests find them; write docs/mutants.md.
	$(BIN)/python tests/mutation/run.py --write

golden: $(VENV)/.test ## Show which bits moved since tests/golden was recorded; ARGS=--write records.
	PYTHONPATH=tests/support $(BIN)/python -m mpcore_testing.golden $(ARGS)

c-steps: $(VENV)/.test ## Write the update rules out as C, after one has changed; build the library.
	$(BIN)/python -c "from mpcore.backends._c_source import write_header; write_header()"
	$(BIN)/python -c "from mpcore.backends._c_command import build_in_place; build_in_place()"

import-time: $(VENV)/.test ## Measure what `import mpcore` adds to `import torch`.
	$(BIN)/python .ci/import_time.py

clean: ## Remove the environment and everything that was built.
	rm -rf $(VENV) dist build site mpcore/backends/_built .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch first: a CUDA build brings the Triton it was made with, and the pin for Triton must then stand
# aside. A CPU build brings none and takes the pinned one.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mpcore needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(INSTALL) torch hatchling editables
	$(BIN)/python -m pip show -qq triton 2>/dev/null || cp constraints.txt $(VENV)/constraints.txt
	@touch $@

# What the package is built from: the C library of the CPU backend is compiled when it is installed.
BUILT_FROM := pyproject.toml hatch_build.py $(addprefix mpcore/backends/,_c_command.py _passes.c _numbers.h _adopt.h _sample.h _stores.h _loop.h _tiles.h _steps.h)

$(VENV)/.demo: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL_SELF) -e ".[demo]"
	@touch $@

$(VENV)/.bench: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL_SELF) -e ".[bench]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL_SELF) -e ".[demo,test,triton]"
	@touch $@

# Newer ones of what is constrained would not do: the tests should judge the same torch.
$(VENV)/.trainers: $(VENV)/.test
	$(INSTALL_SELF) -e ".[demo,test,triton,trainers,trackers]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test $(BUILT_FROM)
	$(INSTALL_SELF) -e ".[demo,test,triton,lint,docs]"
	@touch $@

$(VENV)/.release: $(VENV)/.torch $(BUILT_FROM)
	$(INSTALL_SELF) -e ".[release]"
	@touch $@
