# `make demo` and `make test` are all that a fresh machine needs; each installs what it uses into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)

.PHONY: install demo test lint bench clean

# torch first, at the tested version, so that no other package chooses one.
TORCH ?= torch==2.13.0

$(VENV)/installed: setup.py
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja packaging
	$(BIN)/pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation -e ".[train]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --no-build-isolation -e ".[train,dev]"
	touch $@

install: $(VENV)/installed

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed recipes/rto_tiny.py $(ARGS)

test: export OMP_NUM_THREADS := 1
test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest tests -n auto --maxprocesses 4 --dist loadfile
	PATH="$(abspath $(BIN)):$$PATH" TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev
	$(BIN)/pytest bench --benchmark-only

clean:
	rm -rf $(VENV) build dist *.egg-info
