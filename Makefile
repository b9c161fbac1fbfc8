# Either target works on a bare checkout: it makes .venv and installs what it needs through pyproject.toml.
#
#   make demo     trains a Mixture-of-Experts language model on 8 CPU devices, decodes, measures, draws, writes a report
#   make test     C++ tests, then Python tests
#   make lint     ruff, clang-format, mypy, layering
#   make bench    the benchmark table; BENCH="layer --help" for others
#   make clean    removes what these made
#
# Variables: PYTHON (3.11 or newer), VENV, WORKERS (of pytest), DEMO, TEST, BENCH (arguments).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BENCH ?= exchange

BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc xla_ffi -name '*.cc' -o -name '*.h') CMakeLists.txt sources.bzl pyproject.toml
CPP_SOURCES := $(NATIVE_SOURCES) $(shell find tests/cpp tests/model -name '*.cc' -o -name '*.h')

.PHONY: demo test test-cpp test-python lint bench clean

demo: $(VENV)/installed-examples
	$(BIN)/python examples/demo.py $(DEMO)

test: test-cpp test-python

test-cpp: build/cpp/built
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

test-python: $(VENV)/installed-dev
	$(BIN)/pytest -n $(WORKERS) $(TEST)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files '*.cc' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/python tools/check_layering.py

bench: $(VENV)/installed-examples
	$(BIN)/python -m jax_wideep.bench $(BENCH)

clean:
	rm -rf $(VENV) build demo_out

# Editable: changed Python counts at once, changed C++ is built again.
$(VENV)/installed-%: $(NATIVE_SOURCES) | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/pip:
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	  f"jax_wideep needs Python 3.11 or newer, got {v}; pass one: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }  # Debian without python3-venv

build/cpp/built: $(CPP_SOURCES) $(VENV)/installed-dev
	$(BIN)/cmake -S . -B build/cpp -DWIDEEP_PYTHON=OFF -DWIDEEP_TESTS=ON -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/cpp --parallel 2
	touch $@
