TASK   ?= dual
LOSS_cross = softmax
LOSS_router = margin_ranking
LOSS_recommend = plackett_luce
LOSS   ?= $(or $(LOSS_$(TASK)),mnr)
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
README_DIR ?= .

export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup train test lint docs readme summary reranked figures clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16
	@echo 'TASK=$(TASK)  LOSS=$(LOSS)  VENV=$(VENV)  PYTHON=$(PYTHON)  ARGS="-p data FILE.jsonl -p max_steps 100" can be set behind the target.'

setup: $(READY)  ## make the virtual environment; done again only when a requirement changes

# torch goes first: no other requirement may choose its version or build
$(READY): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt $(shell grep '^torch==' constraints.txt)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,offline,qlora]'
	@touch $@

train: setup  ## train with LOSS, evaluate, write the report: make train LOSS=mnr, or TASK=cross, router, recommend, swipe
	@out="runs/$(TASK)-$(LOSS)-$$(date -u +%Y%m%d-%H%M%S)" && mkdir -p "$$out" && set -x && \
	papermill -k python3 --log-output --no-progress-bar nbs/train.ipynb "$$out/report.ipynb" -p task $(TASK) -p loss $(LOSS) -p out "$$out" $(ARGS) && \
	{ set +x; } 2>/dev/null && echo "The report: $$out/report.html"

test: setup  ## run every numbered notebook, then tests/
	$(VENV)/bin/nbdev-test nbs --file-re '^[0-9]'
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup  ## look for errors in the Python files
	$(VENV)/bin/ruff check .

docs: setup  ## write proj/ and README.md from the notebooks
	$(VENV)/bin/nbdev-export
	$(VENV)/bin/nbdev-clean
	$(MAKE) readme

# nbconvert drops hidden cells before it executes the rest
readme: setup
	$(VENV)/bin/jupyter nbconvert --execute --to markdown nbs/index.ipynb --output-dir "$(README_DIR)" --output README \
	  --RegexRemovePreprocessor.patterns='#\s*\|\s*hide' --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove-input

# the README's table: make summary RUN=runs/<a default run>
summary: setup  ## keep the figures of RUN as nbs/results/default.json, for the README
	$(VENV)/bin/python -c "import sys; from proj.core import write_json; from proj.report import Report; write_json('nbs/results/default.json', Report(sys.argv[1]).summary())" $(RUN)

reranked: setup  ## keep the figures of RUNS of task cross as nbs/results/reranked.json, for the README
	$(VENV)/bin/python -c "import sys; from proj.core import write_json; from proj.report import Report; \
	write_json('nbs/results/reranked.json', [dict(metrics={k: r.results()[k] for k in ('pool', 'systems', 'differences')}, \
	  **{k: r.config[k] for k in ('data', 'retriever', 'depth', 'loss')}, leaking=r.facts_['guard']['leaking_queries']['test'], versions=r.facts_['versions']) for r in map(Report, sys.argv[1:])])" $(RUNS)

figures: setup  ## keep the figures of RUNS as nbs/results/NAME.json, for the README: make figures NAME=swipe RUNS="a b" LABELS="seed 0,seed 1"
	$(VENV)/bin/python -c "import sys; from proj.core import write_json; from proj.report import Report; name, labels, *runs = sys.argv[1:]; \
	write_json(f'nbs/results/{name}.json', [dict(label=label, metrics={k: r.metrics[k] for k in ('pool', 'systems', 'differences')}, data=r.config['data'], loss=r.config['loss'], seed=r.config['seed'], \
	  versions=r.facts_['versions']) for label, r in zip(labels.split(','), map(Report, runs), strict=True)])" $(NAME) "$(LABELS)" $(RUNS)

clean:  ## remove caches and builds; runs and the virtual environment stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis _proc _docs
	find proj tests nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
