# Two commands on a fresh machine do all set-up: `make demo` and `make test`.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# One thread a worker: two workers with two threads each are slower on two cores than two with one.
ONE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1 MPLBACKEND=Agg \
       TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test slow doctest tutorials repro repro-quick lint format typecheck docs wheel clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PY):
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: a second call installs nothing, an edited pyproject.toml installs again.
$(VENV)/.stamp-%: pyproject.toml | $(PY)
	$(PIP) install --quiet -e '.[$*]'
	@touch $@

demo: $(VENV)/.stamp-demo  ## train a small net, fit and tune Laplace, print and draw the result
	$(ONE) $(PY) -m bayesgn.demo

test: $(VENV)/.stamp-test  ## the test suite without the slow tests
	$(ONE) $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" tests

slow: $(VENV)/.stamp-test  ## the slow tests
	$(ONE) $(PY) -m pytest -n $(WORKERS) --dist worksteal -m slow tests || test $$? -eq 5

doctest: $(VENV)/.stamp-test  ## every example in a docstring
	$(ONE) $(PY) -m pytest --doctest-modules bayesgn

tutorials: $(VENV)/.stamp-test  ## run every tutorial; each ends in an assertion
	@for script in $(wildcard tutorials/*.py); do echo "== $$script"; MPLBACKEND=Agg $(PY) "$$script" || exit 1; done

repro: $(VENV)/.stamp-repro  ## the reproductions of papers, compared with their expected numbers (an hour)
	$(ONE) $(PY) -m paper_repro run all

repro-quick: $(VENV)/.stamp-repro  ## small versions of them, under a minute each
	$(ONE) $(PY) -m paper_repro run all --quick

lint: $(VENV)/.stamp-lint $(VENV)/.stamp-test  ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.stamp-lint  ## sort imports and apply ruff's safe fixes
	$(PY) -m ruff check --fix .

docs: $(VENV)/.stamp-docs  ## the site, in site/
	$(PY) -m mkdocs build --strict --quiet
	@echo "built site/index.html"

wheel: $(PY)  ## build the wheel into dist/
	$(PIP) wheel --quiet --no-deps -w dist .

clean:  ## remove what was built, keep .venv
	rm -rf dist site .pytest_cache .ruff_cache .hypothesis
