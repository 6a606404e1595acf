# make help lists the targets. Everything runs in its own virtual environment, .venv.

PYTHON ?= python3
VENV ?= .venv
RLHF := $(VENV)/bin/rlhf
GPUS ?=
NODES ?=
HOSTFILE ?=
SIZE ?= full
DATA ?=
ARGS ?=

launch := $(if $(GPUS),--gpus $(GPUS)) $(if $(NODES),--num-nodes $(NODES)) $(if $(HOSTFILE),--hostfile $(HOSTFILE))
data := $(if $(DATA),--set data.path=$(DATA))
jobs := -n logical --maxprocesses 4 --no-loadscope-reorder
pipeline := $(if $(filter tiny,$(SIZE)),tiny.yaml,pipeline.yaml)

.PHONY: help setup demo test check bench reliability clean hh gsm8k reviews

help:  ## list the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready  ## make the virtual environment with the tested versions

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## SFT -> reward model -> PPO, GRPO, DPO on generated data, CPU only; ends with a table and a page
	$(RLHF) run recipes/demo/pipeline.yaml --run runs/demo $(ARGS)
	$(RLHF) eval demo runs/demo
	$(RLHF) report runs/demo

test: setup  ## all tests, on up to 4 cores
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(jobs) $(ARGS)

check: setup  ## lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup  ## speed and memory of all stages -> docs/performance.md: make bench ARGS="--hh DIR --gsm8k FILE --trl DIR"
	$(VENV)/bin/python -m scripts.bench all --raw --write docs/performance.md $(ARGS)

reliability: setup  ## kill, damage and starve runs, count what is lost -> docs/reliability.md
	$(VENV)/bin/python -m scripts.reliability all --write docs/reliability.md $(ARGS)

hh gsm8k reviews: setup  ## a whole task: make hh DATA=pairs.jsonl GPUS=8 HOSTFILE=hosts; SIZE=tiny: from scratch on a CPU
	$(RLHF) run recipes/$@/$(pipeline) --run runs/$@ $(data) $(launch) $(ARGS)
	$(RLHF) report runs/$@

clean:  ## remove the environment and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
