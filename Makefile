# Each target does all its own set-up: a virtual environment in .venv, the pinned versions, the encoders and data.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-gpu fast lint bench gpu-report fuzz clean

demo: $(READY)
	$(BIN)/u2a-fast train --data emoji --missing-rate 0.7 --output-dir out/demo-$$(date +%Y%m%d-%H%M%S)

# Most tests are one thread of Python: a process for each core, with one thread, takes half the time of one with all.
# All that can be skipped for want of a package is installed: a skipped test is a failed one.
test: lint
	U2A_FAST_NO_SKIPS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=15 -n logical --dist loadfile tests
	$(BIN)/pytest -q benches --benchmark-only -k smoke

# What depends on a device, on every GPU there is; one process, since they would share it.
test-gpu: $(READY)
	$(BIN)/pytest -q -m cuda tests

# One case of every quick test. Tensors this small are slower on two threads.
fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --one-case -m "not slow and not real" tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The results are written even where a limit was missed; the target fails then.
bench: $(READY)
	mkdir -p out
	$(BIN)/pytest benches --benchmark-only -k "not smoke" -s --benchmark-json=out/bench.json; \
	failed=$$?; $(BIN)/python benches/summary.py out/bench.json && exit $$failed

# Needs a GPU; `python -m u2a_fast.gpu_report --dry` tries the script without one. Fails where a result is wrong.
gpu-report: $(READY)
	$(BIN)/python -m u2a_fast.gpu_report --minutes 10 --out report/

# torch first: later packages then take the build that is there instead of pulling in another one.
$(READY): pyproject.toml setup.py constraints.txt requirements-demo.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test,demo]"
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-demo.txt
	touch $@

# Ten thousand malformed files, tables, labels and lines; the suite tries a few hundred.
fuzz: $(READY)
	$(BIN)/python tests/support/fuzz.py 10000

clean:
	rm -rf .venv build dist *.egg-info
