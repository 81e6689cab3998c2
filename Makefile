# Every target makes the virtual environment it needs: no other command comes first.
#
#   PYTHON   the interpreter the environment is made from        (make test PYTHON=python3.12)
#   WORKERS  processes the tests run in                          (make test WORKERS=8)
#   ARGS     passed on to pytest, asv or the atlas               (make test ARGS='-k nystrom')

PYTHON  ?= python3
WORKERS ?= 2
VENV    ?= .venv
ARGS    ?=
# Each `make run` writes into a directory of its own, so that nothing is overwritten.
RUN     ?= runs/$(shell date +%Y%m%d-%H%M%S)
# The atlas, and the environments of the packages that it is compared with.
ATLAS   ?= runs/atlas
PEERS   ?= .peers
# The comparison of PPO and BLPO trainings.
RL_PEERS ?= runs/rl_peers
# Times of solves beside those of other packages.
PEERS_SPEED ?= runs/peers_speed

PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
EXTRAS  := rl,examples,dev,docs,bench

# The problems here are small: more threads in one process cost more than they bring, and
# two test processes of two threads each on two cores are far slower than of one.
export OMP_NUM_THREADS      ?= 1
export MKL_NUM_THREADS      ?= $(OMP_NUM_THREADS)
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)
# Pictures are written to files; no display is needed.
export MPLBACKEND           ?= Agg

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help run test test-slow lint format types docs bench bench-check growth gpu atlas peers peers-speed peers-rl clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP) ## Main job: data hyper-cleaning, then PPO, Nested and BLPO on CartPole (minutes)
	$(PY) docs/examples/hyper_cleaning.py --run-dir $(RUN)/hyper_cleaning
	$(PY) -m hypergrad_rl compare --algos ppo nested blpo --env CartPole-v1 --seeds 0 1 --total-steps 150000 --jobs 2 --run-dir $(RUN)/cartpole

test: lint types docs ## Everything a change must pass: lint, types, strict docs, tests
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-slow: $(STAMP) ## The statistical and training checks that `test` leaves out
	HYPOTHESIS_PROFILE=slow $(PY) -m pytest -n $(WORKERS) --dist loadgroup -m slow --timeout 3600 $(ARGS)

lint: $(STAMP) ## Ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP) ## Let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP) ## Mypy, strict on both packages
	$(PY) -m mypy

# -E reads every page anew: a cached page does not repeat its warnings, so a second run would pass.
docs: $(STAMP) ## Build the site into docs/_build/html; a warning is an error
	$(PY) -m sphinx -E -W -n --keep-going -q -b html docs docs/_build/html

bench: $(STAMP) ## Benchmarks of this checkout: asv and its pages into benchmarks/.asv, pictures into runs/bench
	cd benchmarks && $(abspath $(PY)) -m asv machine --yes > /dev/null
	cd benchmarks && $(abspath $(PY)) -m asv run --python=same --set-commit-hash $$(git rev-parse HEAD) $(or $(ARGS),--quick)
	cd benchmarks && $(abspath $(PY)) -m asv publish
	$(PY) -m benchmarks.report

bench-check: $(STAMP) ## Fail where a solver has become more than a fifth slower (ratios, minutes)
	$(PY) -m benchmarks.check $(ARGS)

growth: $(STAMP) ## Time and peak memory over six quantities, with exponents, into runs/growth (minutes)
	$(PY) -m benchmarks.growth $(ARGS)

gpu: $(STAMP) ## Solvers and agents on the CUDA device, checked against the CPU, into runs/gpu.md
	$(PY) -m benchmarks.gpu $(ARGS)

# `make atlas ATLAS=docs/_static/atlas` renews the tables and pictures of the page.
atlas: $(STAMP) ## Stability atlas: error against products, tables and heat maps into runs/atlas (minutes)
	$(PY) -m benchmarks.atlas --output $(ATLAS) $(ARGS)

peers: $(STAMP) ## Other packages on the atlas, each in an environment of its own in .peers (minutes)
	$(if $(wildcard $(ATLAS)/cases.npz),,$(PY) -m benchmarks.atlas --output $(ATLAS))
	$(PY) -m benchmarks.peers --output $(ATLAS) --environments $(PEERS) $(ARGS)
	$(PY) -m benchmarks.atlas --output $(ATLAS) --draw-only

# `make peers-rl RL_PEERS=docs/_static/rl_peers` renews the table and the picture of the page.
peers-rl: $(STAMP) ## PPO and BLPO training beside other programs, one core each (10 to 15 minutes)
	$(PY) -m benchmarks.rl_peers --output $(RL_PEERS) --environments $(PEERS) $(ARGS)

# A run that was cut short goes on; remove times.csv to measure anew.
# `make peers-speed PEERS_SPEED=docs/_static/peers_speed` renews the tables and the picture of the page.
peers-speed: $(STAMP) ## Time to an IHVP of a given accuracy, beside other packages and JAX (minutes)
	$(PY) -m benchmarks.peers.speed --output $(PEERS_SPEED) --environments $(PEERS) $(ARGS)

clean: ## Remove caches and build outputs (the environment and runs/ stay)
	rm -rf build dist *.egg-info docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(PEERS)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.10 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv), or name another interpreter: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
