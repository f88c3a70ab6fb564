# One runner for the tasks of a developer; `make` lists them. The gate of a commit is .ci/run.
#
# PYTHON names the interpreter, WORKERS how many test processes run side by side.

SHELL := bash
PYTHON ?= python
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Tests of functions: no engine is built, no learner, no sandbox, no other process.
QUICK = tests/algo $(wildcard tests/config) tests/data tests/docs/test_pages.py tests/observability tests/packing \
  tests/packaging/test_imports.py tests/packaging/test_slow_marks.py tests/property/test_protocol.py \
  tests/rollout/test_sampler.py tests/rollout/test_store.py tests/run/test_config.py \
  tests/run/test_resume.py tests/trainer/test_balance.py
FAST = -m 'not slow and not study and not gpu and not vllm'

# Scripts that measure something themselves; the other files of these folders are their parts.
BENCH = $(shell grep -l -e '--quick\|common import.* arguments\|common import.* parser' \
  $$(grep -l __main__ bench/kernels/*.py bench/engine/*.py bench/learner/*.py bench/gpu/suite.py \
  bench/gpu/roofline.py bench/gpu/aot_report.py bench/evidence/seeded_faults.py))

.PHONY: help quick test slow-marks types lint docs docs-serve bench-list bench-quick gpu sanitize

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quick: ## tests of functions, in less than a minute
	time -p $(PYTHON) -m pytest -q -p no:benchmark $(FAST) $(QUICK)

test: ## the whole suite, as the README gives it
	time -p $(PYTHON) -m pytest -q -n $(WORKERS) --dist loadfile

slow-marks: ## the whole suite, and from its report the list of slow tests
	$(PYTHON) -m pytest -q -n $(WORKERS) --dist loadfile -o junit_family=xunit1 --junitxml=build/tests.xml
	$(PYTHON) tests/support/durations.py build/tests.xml

types: ## mypy
	$(PYTHON) -m mypy

lint: ## ruff, its formatter, and whether generated pages are current
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) docs/generate.py --check

docs: ## the site into build/site, warnings are errors; then the code blocks of all pages
	$(PYTHON) docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	$(PYTHON) -m pytest -q tests/docs

docs-serve: ## the site while you write, at a local port
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs serve

bench-list: ## the scripts that bench-quick runs
	@printf '%s\n' $(BENCH)

bench-quick: ## every benchmark with --quick: shows that it runs, not how fast
	@failed=; for script in $(BENCH); do \
	  begin=$$(date +%s); echo "== $$script --quick"; \
	  env -u TRITON_INTERPRET $(PYTHON) $$script --quick || failed="$$failed $$script"; \
	  echo "== $$script: $$(($$(date +%s) - begin)) s"; \
	done; if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

gpu: ## what needs a CUDA device: tests, accuracy, sweeps, peers
	$(PYTHON) bench/gpu/suite.py --require-gpu

sanitize: ## the native library under ASan and UBSan, and the tests of the kernels on it; minutes
	PYTHON=$(PYTHON) tests/sanitizer/run.sh
