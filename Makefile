# make demo: install into .venv and describe the shipped clip with the bundled pair.
# make test: install into .venv and run all checks.
# make test-slow: the rest of the checks: more clips, more shapes of kernels.
# make test-latest: the same with the newest version of everything, in .venv-latest.
# make docs: the site of docs/, in build/site; it needs no network to be built or read.
# make lock: choose the versions that all others install, requirements/*.txt. What is locked stays; UPGRADE=1 takes what is
#   newest. Made with Python 3.11 on Linux x86_64; elsewhere what the lists lack is installed unpinned.
# Python 3.11 or newer is all that must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIP := src/specvlm/bundled/clips/example.mp4

# Versions without hashes: one list serves torch's CPU and CUDA builds, and pip takes no hashes beside an editable install.
LOCK ?= -c requirements/constraints.txt
LOCK_OLDER ?= -c requirements/older.txt
LMMS_EVAL ?= lmms_eval==0.7.3
INSTALL := $(BIN)/python -m pip install -q
COMPILE := CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile -q $(if $(UPGRADE),--upgrade) --strip-extras --allow-unsafe \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

.PHONY: demo test test-slow test-latest lint docs lock report studies plots clean

$(VENV)/base: requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(LOCK) pip setuptools
	touch $@

$(VENV)/demo: $(VENV)/base pyproject.toml
	$(INSTALL) $(LOCK) --no-build-isolation -e .
	touch $@

$(VENV)/report: $(VENV)/demo
	$(INSTALL) $(LOCK) --no-build-isolation -e ".[bench]"
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(INSTALL) $(LOCK) --no-build-isolation -e ".[docs]"
	touch $@

# Beside the environment, never in it: torchvision, the oracle for pixels, which without its own build of torch breaks
# transformers when it is imported, and the older transformers that is served.
$(VENV)/test: $(VENV)/demo requirements/lmms.in requirements/older.txt
	$(INSTALL) $(LOCK) --no-build-isolation -e ".[test,bench]" -r requirements/lmms.in
	$(INSTALL) --no-deps $(LMMS_EVAL)
	$(INSTALL) $(LOCK) --no-deps --upgrade --target $(VENV)/oracle torchvision
	$(INSTALL) $(LOCK_OLDER) --no-deps --upgrade --target $(VENV)/older -r requirements/older.in
	touch $@

demo: $(VENV)/demo
	$(BIN)/specvlm describe $(CLIP) "Describe the video in detail." --stats
	$(BIN)/specvlm compare $(CLIP) "Describe the video in detail."

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: two would wait for each other at every small product as soon as both cores are busy.
test test-slow report: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/pytest -n 2
	PYTHONPATH=$(VENV)/older $(BIN)/pytest -n 2 tests/test_families.py tests/test_engine.py tests/test_rules.py -k "not law and not drafter"

test-slow: $(VENV)/test
	$(BIN)/pytest -n 2 -m slow

test-latest:
	$(MAKE) test VENV=.venv-latest LOCK= LOCK_OLDER= LMMS_EVAL=lmms_eval

# the variable silences an advertisement for another tool
docs: $(VENV)/docs
	$(BIN)/python docs/rooms.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

lock: $(VENV)/base
	$(INSTALL) $(LOCK) pip-tools
	$(COMPILE) --all-extras -o requirements/constraints.txt pyproject.toml requirements/constraints.in
	$(COMPILE) -o requirements/older.txt requirements/older.in

# the report of the bundled pair on its 40 held-out clips: build/report/report.html
report: $(VENV)/report
	$(BIN)/specvlm bench quality --out build/report

# what docs/studies.md teaches, measured again into build/studies; about an hour on one core
studies: $(VENV)/report
	BIN=$(BIN) bash results/cpu/studies/run.sh build/studies

# every plot of docs/plots, from the data in results/
plots: $(VENV)/report
	$(BIN)/specvlm bench speed --plots docs/plots --from results/h200/speed-32b.jsonl results/h200/drafts-32b-quant.jsonl \
	  results/h200/speed-small.jsonl results/h200/drafts-qwen3.jsonl results/h200/drafts-llava.jsonl >/dev/null
	$(BIN)/specvlm report results/cpu/studies/pruners -o build/pruners >/dev/null
	cp build/pruners/plots/mat-over-keep-ratio.png docs/plots/pruners-mat.png

clean:
	rm -rf .venv .venv-latest build dist *.egg-info
