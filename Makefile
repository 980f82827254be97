# make demo               the workflow on the sample corpus: any CPU, no model hub
# make all                PAN-X.it and xlm-roberta-base from the Hub, on GPU 0; make gpu-check tests the GPU first
# make venv, venv-gpu     .venv with the packages for a CPU, or for a GPU; venv-dev adds those for tests
# make test               ruff and the test suite
# make test-faults, fuzz  longer: killed commands, repeated runs, full disks; damaged files
# make known-answers      the demo's entities in 200 sentences against the accepted ones; ACCEPT=1 accepts the new ones
# make lock               write the lock files, after a change of a requirements file
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -q --disable-pip-version-check
INSTALL := $(PIP) install --no-deps --require-hashes -r
# PyTorch's CPU build (Linux, Python 3.11), which is not on PyPI
CPU_TORCH := torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
LOCK := $(BIN)/python -m uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
SET := .venv/requirements$(if $(wildcard .venv/requirements-gpu.lock),-gpu).lock
.PHONY: all demo fuzz gpu-check known-answers lock test test-faults venv venv-dev venv-gpu
venv: $(SET)
venv-gpu: .venv/requirements-gpu.lock
venv-dev: .venv/requirements-dev.lock
.venv/requirements.lock: requirements.lock
	$(PYTHON) -m venv .venv
	$(INSTALL) $< && $(PIP) check && touch $@ || { echo "Installing requirements-gpu.lock instead, which also runs on a CPU."; $(MAKE) venv-gpu; }
.venv/requirements-gpu.lock: requirements-gpu.lock
	$(PYTHON) -m venv .venv
	$(INSTALL) $< && $(PIP) check && touch $@
.venv/requirements-dev.lock: requirements-dev.lock $(SET)
	$(INSTALL) $< && $(PIP) check && touch $@
all gpu-check:
	@nvidia-smi > /dev/null 2>&1 || { echo "No NVIDIA driver works here (nvidia-smi fails): install one, or run on the CPU with \
	\`make venv\` and \`$(BIN)/python -m spacy project run all . --vars.gpu_id -1\`."; exit 1; }
	$(MAKE) venv-gpu
	$(BIN)/python -m $(if $(filter all,$@),spacy project run all,benchmarks.gpu_check)
demo: venv
	@$(BIN)/python -u examples/demo.py
test: venv-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest
test-faults: venv-dev
	FAULTS=1 $(BIN)/python -m pytest -s tests/faults tests/test_download.py tests/test_annotate.py
known-answers:
	@test -x build/demo-venv/bin/python || { echo "build/demo-venv does not exist; run make demo first."; exit 1; }
	build/demo-venv/bin/python -m benchmarks.known_answers it_panx_xlmr $(if $(ACCEPT),--accept)
fuzz: venv-dev
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/fuzz tests/test_hostile.py
lock: venv-dev
	$(LOCK) requirements-gpu.txt requirements-dev.txt -o build/all.lock
	$(LOCK) requirements-gpu.txt -c build/all.lock -o requirements-gpu.lock
	$(LOCK) requirements-dev.txt -c build/all.lock -o requirements-dev.lock \
		$$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements-gpu.lock)
	$(LOCK) requirements.txt -c build/all.lock -o build/cpu.lock
	awk '/^[a-z]/ {skip = /^(cuda|nvidia|torch|triton)/; if (!n++) print "$(CPU_TORCH)"} !skip' build/cpu.lock > requirements.lock
