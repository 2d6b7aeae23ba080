# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SETUP_FILES = pyproject.toml constraints.txt

.PHONY: demo test test-quick test-timing test-hosts test-ops lint format bench warmup test-gpu sanitize-gpu bench-gpu test-musa fuzz fuzz-sanitize clean-cache wheel wheels

demo: $(VENV)/.ready $(VENV)/.demo
	$(BIN)/python examples/first_call.py
	$(BIN)/python examples/rms_norm.py
	HF_HUB_OFFLINE=1 $(BIN)/python examples/sentence_search.py

# A file's tests stay in one process, as they share what their file compiles.
TEST_JOBS ?= 2
test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not gpu and not musa" -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

# Some tests of every folder, within a minute.
test-quick: $(VENV)/.ready
	$(BIN)/python -m pytest -m "quick and not gpu and not musa" $(PYTEST_ARGS)

# Limits on time, which a busy machine does not keep.
test-timing: $(VENV)/.ready
	$(BIN)/python -m pytest -m timing $(PYTEST_ARGS) tests/test_timing.py

# Every family of models, and what else takes long, with the programs that call jit_kernel; then the same with other
# versions of transformers: the last one that takes the newest kernels on the index, and the oldest that works.
HOSTS_TESTS = tests/integrations/test_local_kernels.py tests/integrations/test_families.py
OLDEST_TESTS = tests/integrations/test_transformers.py tests/integrations/test_transformers_masks.py
test-hosts: $(VENV)/.hosts
	$(BIN)/python -m pytest -m "hosts and not gpu" $(PYTEST_ARGS)
	PYTHONPATH=$(VENV)/transformers-5.22:$$PYTHONPATH $(BIN)/python -m pytest -m hosts -k "LOCAL_KERNELS or local_kernels" \
	  $(PYTEST_ARGS) $(HOSTS_TESTS)
	PYTHONPATH=$(VENV)/transformers-5.4:$$PYTHONPATH $(BIN)/python -m pytest $(PYTEST_ARGS) $(OLDEST_TESTS)

# Random calls, then faults against the store, each for SECONDS; SEED picks others.
SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/.ready
	$(BIN)/python -m tests.fuzz.calls --seconds $(SECONDS) --seed $(SEED) --jobs 2 $(FUZZ_ARGS)
	$(BIN)/python -m tests.fuzz.store_campaign --seconds $(SECONDS) --seed $(SEED)

# The same on kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch.
fuzz-sanitize: $(VENV)/.ready
	$(BIN)/python -m tests.fuzz.sanitized --seconds $(SECONDS) --seed $(SEED) $(FUZZ_ARGS)
	JIT_KERNEL_TEST_CASES=300 $(BIN)/python -m tests.ops.sanitized

# All random cases of the small kernels; then their CUDA sources on the CPU, each instance compiled by g++.
test-ops: $(VENV)/.ready
	JIT_KERNEL_TEST_CASES=300 $(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS) tests/ops
	$(BIN)/python -m pytest -m emulated $(PYTEST_ARGS) tests/ops

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.ready $(VENV)/.bench
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/cpu_attention.py
	$(BIN)/python benchmarks/draw.py

warmup: $(VENV)/.ready
	$(BIN)/python -m jit_kernel.warmup $(WARMUP_ARGS)

# The GPU targets take the Python that is there, with its own torch and its own CUDA.
test-gpu:
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

sanitize-gpu:
	for tool in memcheck initcheck racecheck synccheck; do \
		PYTHONPATH=.:$$PYTHONPATH compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(PYTHON) tests/support/sanitized_calls.py || exit; \
		JIT_KERNEL_TEST_CASES=10 PYTHONPATH=.:$$PYTHONPATH compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(PYTHON) -m pytest -q -m gpu tests/ops -k "random or outside or past" || exit; done

bench-gpu:
	$(PYTHON) benchmarks/hopper_prefill.py
	$(PYTHON) benchmarks/hopper_serving.py --check
	$(PYTHON) benchmarks/portable.py
	$(PYTHON) benchmarks/gradients_gpu.py
	$(PYTHON) benchmarks/overhead.py --device cuda
	$(PYTHON) benchmarks/ops.py --device cuda
	$(PYTHON) benchmarks/toolkit.py

# No test needs a Moore Threads GPU: these run a double of the machine and calls recorded from MATE's front end.
test-musa: $(VENV)/.ready
	$(BIN)/python -m pytest tests/musa $(PYTEST_ARGS)

wheel: $(VENV)/.ready
	$(PIP) build hatchling
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

# The plain wheel, one with launchers for this machine's kind, x86-64, and one for aarch64, compiled by ziglang's clang.
wheels: wheel
	$(PIP) ziglang
	$(BIN)/python tools/platform_wheel.py $$(ls -t dist/jit_kernel-*-py3-none-any.whl | head -1) --out dist \
		--cross "aarch64=$(abspath $(BIN))/python -m ziglang c++ -target aarch64-linux-gnu.2.17"

clean-cache:
	rm -rf cache/store

$(VENV)/.ready: $(SETUP_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[test,transformers,diffusers,cuda13]'
	touch $@

$(VENV)/.hosts: $(VENV)/.ready
	$(PIP) --editable '.[hosts]'
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(VENV)/transformers-5.22 \
	  --upgrade transformers==5.22.2
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --target $(VENV)/transformers-5.4 --upgrade \
	  transformers==5.4.0 'kernels>=0.12,<0.13'
	touch $@

$(VENV)/.demo: $(VENV)/.ready examples/requirements-sentence-search.txt
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
	  --requirement examples/requirements-sentence-search.txt
	touch $@

$(VENV)/.lint: $(VENV)/.ready
	$(PIP) --editable '.[lint]'
	touch $@

$(VENV)/.bench: $(VENV)/.ready
	$(PIP) --editable '.[bench]'
	touch $@
