# make demo   the whole workflow on the sample corpus, on any CPU, without a model hub
# make test   the test suite
# make known-answers   what the demo's package finds in 200 sentences, beside what was accepted
# make test-faults   commands killed, full disks, a failing hub: 50 kills, some 20 minutes
# make all    the real thing: PAN-X.it and xlm-roberta-base from the Hub, on GPU 0

PYTHON ?= python3
BIN := .venv/bin
VERSION = $(shell sed -n 's/^  version: "\(.*\)"/\1/p' project.yml)
# the sample is less than half of what the card trains on: smaller batches make enough steps of it
DEMO_VARS = --vars.gpu_id -1 --vars.dataset corpus/sample --vars.dataset_config sample \
	--vars.encoder assets/encoder-small --vars.train_size 0 --vars.dev_size 0 --vars.test_size 0 \
	--vars.batch_size 8 --vars.epochs 2
DEMO_VENV := build/demo-venv

.PHONY: all demo known-answers test test-faults venv

.venv/requirements.txt: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	cp requirements.txt $@

.venv/requirements-dev.txt: .venv/requirements.txt requirements-dev.txt requirements-annotate.txt examples/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	cp requirements-dev.txt $@

venv: .venv/requirements.txt

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

test: .venv/requirements-dev.txt
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-faults: .venv/requirements-dev.txt
	FAULTS=1 $(BIN)/python -m pytest -s tests/faults tests/test_download.py tests/test_annotate.py

known-answers:
	@test -x $(DEMO_VENV)/bin/python || { echo "$(DEMO_VENV) is not there; run make demo first."; exit 1; }
	$(DEMO_VENV)/bin/python tests/known_answers/compare.py it_panx_xlmr $(if $(ACCEPT),--accept)
