# make demo: train ALIGN on drawings with names, evaluate, and write a report. make test: run the tests. make docs: build the
# documentation. make results: write docs/results.md from the records in results/. Each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo

OUT ?= runs/gpu

# $(call train,RUN,CONFIG) trains a config, or continues its run folder.
train = if [ -e $(1)/experiment.json ]; then $(BIN)/vlp train --resume $(1); else $(BIN)/vlp train $(2); fi

.PHONY: demo demo-fusion test test-fast bench gpu gpu-carry results docs lint clean

demo: .venv/.demo
	$(BIN)/vlp data demo data/openmoji
	$(call train,$(RUN),configs/align/demo.py)
	$(BIN)/vlp eval $(RUN) retrieval
	$(BIN)/vlp report $(RUN)

demo-fusion: .venv/.demo
	$(BIN)/vlp data world data/world --single 20000
	if [ ! -e data/world/tokenizer ]; then $(BIN)/vlp data tokenizer data/world/train data/world/tokenizer --vocab-size 200; fi
	$(call train,runs/world-tower,configs/albef/world.py:tower)
	$(call train,runs/albef-world,configs/albef/world.py)
	$(BIN)/vlp eval runs/albef-world minimal-pairs
	$(BIN)/vlp eval runs/albef-world minimal-pairs score=itc
	$(BIN)/vlp eval runs/albef-world rerank k=16
	$(BIN)/vlp eval runs/albef-world grounding data=data/world/grounding.jsonl images=data/world/val image=key
	$(BIN)/vlp report runs/albef-world

test: .venv/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-fast: .venv/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

bench: .venv/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks

# On a machine with a GPU; without .venv it takes that machine's own packages and what gpu-carry has put into .carry/.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --out $(OUT)

gpu-carry: .venv/.dev
	$(BIN)/python -m benchmarks.gpu.carry

results: .venv/.dev
	$(BIN)/python -m results

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.demo: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

.venv/.docs: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

.venv/.dev: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv runs data site
