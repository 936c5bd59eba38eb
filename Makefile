# Each target does all its own set-up: a virtual environment in .venv, the pinned versions, the encoders and data.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest/bin

# What a test starts finds compiled what another has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-gpu test-oldest fast lint docs bench gpu-report fuzz chaos clean

demo: $(READY)
	$(BIN)/u2a-fast train --data emoji --missing-rate 0.7 --epochs 10 --output-dir out/demo-$$(date +%Y%m%d-%H%M%S)

# Most tests are one thread of Python: a process for each core, with one thread, takes half the time of one with all.
# The last files start processes and take minutes: who is idle takes half of what the other has left.
# All that can be skipped for want of a package is installed: a skipped test is a failed one.
test: lint
	U2A_FAST_NO_SKIPS=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations=15 -n logical --dist worksteal tests
	$(BIN)/pytest -q benches --benchmark-only -k smoke

# What depends on a device, on every GPU there is. Most of it is the host's time: processes share the GPU, half a GB each.
test-gpu: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m cuda -n 8 --dist worksteal tests

# With the oldest versions that pyproject.toml allows, in an environment of their own: 3 GB, which CI does not download.
test-oldest: .venv-oldest/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/pytest -q --durations=15 -n logical --dist worksteal tests
	$(OLDEST)/pytest -q benches --benchmark-only -k smoke

# One case of every quick test.
fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --one-case -m "not slow and not real" -n logical --dist worksteal tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages as a site in out/site; a link that leads nowhere or a name that is not there is an error.
docs: $(READY)
	$(BIN)/mkdocs build --strict

# The results are written even where a limit was missed; the target fails then.
bench: $(READY)
	mkdir -p out
	$(BIN)/pytest benches --benchmark-only -k "not smoke" -s --benchmark-json=out/bench.json; \
	failed=$$?; $(BIN)/python benches/summary.py out/bench.json && exit $$failed

# Needs a GPU; `python -m u2a_fast.gpu_report --dry` tries the script without one. Fails where a result is wrong.
gpu-report: $(READY)
	$(BIN)/python -m u2a_fast.gpu_report --minutes 10 --out report/

# torch first: later packages then take the build that is there instead of pulling in another one.
define install
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -c $(1) torch
	$(@D)/bin/pip install -q -c $(1) -e ".[test,demo]"
	$(@D)/bin/pip install -q --no-deps --require-hashes -r requirements-demo.txt
	touch $@
endef

$(READY): pyproject.toml setup.py constraints.txt requirements-demo.txt
	$(call install,constraints.txt)

.venv-oldest/.ready: pyproject.toml setup.py constraints-oldest.txt requirements-demo.txt
	$(call install,constraints-oldest.txt)

# Ten thousand malformed files, tables, labels, lines and models; the suite tries a few hundred.
fuzz: $(READY)
	$(BIN)/python tests/support/fuzz.py 10000

# Runs that are killed at fifty random points, resumed, and compared with one that nobody disturbed; the suite: five.
chaos: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/chaos.py 50

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
