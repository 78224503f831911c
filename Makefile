# make demo: install into .venv and describe the shipped clip with the bundled pair.
# make test: install into .venv and run all checks.
# Python 3.11 or newer is all that must be there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
CLIP := src/specvlm/bundled/clips/example.mp4

.PHONY: demo test lint report studies plots clean

# torch comes first and pinned: left to itself, pip takes a build with several gigabytes of GPU packages
.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e .
	touch $@

.venv/report: .venv/demo
	$(BIN)/pip install -q -e ".[bench]"
	touch $@

# Beside the environment, never in it: torchvision, the oracle for pixels, which without its own build of torch breaks
# transformers when it is imported, lmms-eval, which asks for an older av, and the older transformers that is served.
.venv/test: .venv/demo
	$(BIN)/pip install -q -e ".[test,bench]" "transformers==5.23.0" "triton==3.9.0"
	$(BIN)/pip install -q --no-deps --target .venv/oracle torchvision==0.28.0
	$(BIN)/pip install -q --no-deps --target .venv/lmms -r tests/lmms_task/requirements.txt
	$(BIN)/pip install -q --no-deps --target .venv/older transformers==5.17.0 "huggingface_hub<2"
	touch $@

demo: .venv/demo
	$(BIN)/specvlm describe $(CLIP) "Describe the video in detail." --stats
	$(BIN)/specvlm compare $(CLIP) "Describe the video in detail."

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2
	PYTHONPATH=.venv/lmms $(BIN)/pytest tests/test_lmms.py
	PYTHONPATH=.venv/older $(BIN)/pytest -n 2 tests/test_families.py tests/test_engine.py tests/test_rules.py

# the report of the bundled pair on its 40 held-out clips: build/report/report.html. One thread: a second one gains little
# on models so small, and where another process takes its core, both wait.
report: .venv/report
	OMP_NUM_THREADS=1 $(BIN)/specvlm bench quality --out build/report

# what docs/studies.md teaches, measured again into build/studies; about an hour on one core
studies: .venv/report
	BIN=$(BIN) bash results/cpu/studies/run.sh build/studies

# every plot of docs/plots, from the data in results/
plots: .venv/report
	$(BIN)/specvlm bench speed --plots docs/plots --from results/h200/speed-32b.jsonl results/h200/drafts-32b-quant.jsonl \
	  results/h200/speed-small.jsonl results/h200/drafts-qwen3.jsonl results/h200/drafts-llava.jsonl >/dev/null
	$(BIN)/specvlm report results/cpu/studies/pruners -o build/pruners >/dev/null
	cp build/pruners/plots/mat-over-keep-ratio.png docs/plots/pruners-mat.png

clean:
	rm -rf .venv build dist *.egg-info
