# make demo   the whole workflow on the sample corpus, on any CPU, without a model hub
# make test   the test suite
# make known-answers   what the demo's package finds in 200 sentences, beside what was accepted
# make test-faults   commands killed, full disks, a failing hub: 50 kills, some 20 minutes
# make test-reproducible   the workflow in two folders: the same wheel contents
# make fuzz   damaged files for 10 minutes (MINUTES), then odd texts by the thousand
# make lock   requirements*.lock anew, after a change of a requirements file
# make all    the real thing: PAN-X.it and xlm-roberta-base from the Hub, on GPU 0

PYTHON ?= python3
BIN := .venv/bin
VERSION = $(shell sed -n 's/^  version: "\(.*\)"/\1/p' project.yml)
# the sample is less than half of what the card trains on: smaller batches make enough steps of it
DEMO_VARS = --vars.gpu_id -1 --vars.dataset corpus/sample --vars.dataset_config sample \
	--vars.encoder assets/encoder-small --vars.train_size 0 --vars.dev_size 0 --vars.test_size 0 \
	--vars.batch_size 8 --vars.epochs 2
DEMO_VENV := build/demo-venv

.PHONY: all demo fuzz known-answers lock test test-faults test-reproducible venv venv-dev venv-gpu

PIP = $(BIN)/python -m pip --disable-pip-version-check -q
# versions and hashes of every package: `make lock` has written them
INSTALL = $(PIP) install --no-deps --require-hashes

.venv/requirements.lock: requirements.lock requirements-cpu.lock requirements-cuda.lock
	$(PYTHON) -m venv .venv
# PyTorch's CPU build, if pip finds it; else the next line takes PyPI's
	$(INSTALL) -r requirements-cpu.lock 2> /dev/null || true
	$(INSTALL) -r requirements.lock
# PyTorch's build on PyPI wants CUDA's libraries even on a CPU (3 GB); its CPU builds do without
	$(PIP) check > /dev/null || $(INSTALL) -r requirements-cuda.lock
	$(PIP) check
	cp requirements.lock $@

.venv/requirements-dev.lock: .venv/requirements.lock requirements-dev.lock
	$(INSTALL) -r requirements-dev.lock
	$(PIP) check
	cp requirements-dev.lock $@

venv: .venv/requirements.lock

venv-dev: .venv/requirements-dev.lock

# after venv, on a machine with a GPU
venv-gpu: venv
	$(INSTALL) -r requirements-cuda.lock -r requirements-gpu.lock

lock: venv-dev
	$(BIN)/python -m scripts.lock

all: venv
	$(BIN)/python -m spacy project run all

demo: venv
	$(BIN)/python -m spacy project run build-encoder
	$(BIN)/python -m spacy project run all . $(DEMO_VARS)
	rm -rf $(DEMO_VENV)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --disable-pip-version-check -q -c requirements.txt \
		packages/it_panx_xlmr-$(VERSION)/dist/it_panx_xlmr-$(VERSION)-py3-none-any.whl
	cd $(DEMO_VENV) && HF_HUB_OFFLINE=1 bin/python ../../scripts/show_entities.py it_panx_xlmr

test: venv-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-faults: venv-dev
	FAULTS=1 $(BIN)/python -m pytest -s tests/faults tests/test_download.py tests/test_annotate.py

known-answers:
	@test -x $(DEMO_VENV)/bin/python || { echo "$(DEMO_VENV) is not there; run make demo first."; exit 1; }
	$(DEMO_VENV)/bin/python -m tests.known_answers.compare it_panx_xlmr $(if $(ACCEPT),--accept)

fuzz: venv-dev
	$(BIN)/python tests/fuzz/test_readers.py --minutes $(or $(MINUTES),10)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_hostile.py tests/test_linear_tokenizer.py

test-reproducible: venv-dev
	REPRODUCIBLE=1 $(BIN)/python -m pytest tests/test_reproducible.py
