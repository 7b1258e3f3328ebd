# `make demo` and `make test` each set up everything they need from nothing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
FID_VENV  := .venv-fid
FID_STAMP := $(FID_VENV)/.installed
DEMO   ?= build/demo
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export SYMBREAK_DATA

.PHONY: demo test test-slow test-fid test-oldest test-newest lint bench docs figures dist clean
.PHONY: reproduce-mnist reproduce-celeba reproduce-cifar10

# The bare "torch" comes first: a pip that finds a CPU wheel of this exact version keeps it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/symbreak study --data digits --model digits --samplers ddim,dpm++2m --calls 3,5 --samples 600 --out $(DEMO)

# A process a core, one thread each: most tests are too small for a pool of threads. Files in their own order: by the
# number of their tests, as xdist has it, the files of few long tests come last, and one core waits for the other.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 3600 --numprocesses auto --dist loadfile --no-loadscope-reorder

# torchvision breaks other packages beside the CPU build of torch: it gets an environment of its own, and comes
# without its dependencies, which would bring CUDA libraries.
$(FID_STAMP): pyproject.toml constraints.txt
	test -x $(FID_VENV)/bin/python || $(PYTHON) -m venv $(FID_VENV)
	$(FID_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(FID_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
	$(FID_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,fid]"
	touch $(FID_STAMP)

test-fid: $(FID_STAMP)
	$(FID_VENV)/bin/python -c "import sys, tests.torchvision_operators, pytest; sys.exit(pytest.main(sys.argv[1:]))" \
		-m fid --timeout 1200 tests/test_fid_oracle.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# The site, offline, into build/site: python -m http.server -d build/site (pages open from disk, the search does not).
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The quick pictures of docs/; table and figure of the digits where build/study has a study. CONTRIBUTING lists the others.
figures: $(STAMP)
	$(BIN)/python scripts/draw_starts.py
	$(BIN)/python scripts/make_docs.py

# A wheel and an sdist in dist/, tried in an environment that has only them and what they ask for.
dist: $(STAMP)
	rm -rf dist build/clean
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && clean/bin/python ../scripts/smoke.py

# The quick tests with the oldest versions that pyproject.toml allows (OLDEST names a Python 3.10), and with the newest, but
# for torch: without a pin pip would bring gigabytes of CUDA libraries (TORCH=torch takes the newest all the same).
# Run on 2026-11-28. Newest (Python 3.11.7, torch 2.13.0; numpy 2.4.6, scipy 1.17.1, transformers 5.24): all quick tests, in three
# pieces, none failed. Oldest (Python 3.10.13; torch 2.6.0, diffusers 0.41.0, numpy 1.26.0, scipy 1.12.0, pyarrow 15): all in one
# run, 2,780 passed, 3 failed: two tests are repaired, one passes where the machine is not busy. Python 3.12.1 and 3.13.0 with
# torch 2.14.1: 970 quick tests of the command line, data, starts, schedulers, loading, training, laws and printing, all passed.
OLDEST ?= python3.10
test-oldest: export OMP_NUM_THREADS = 1
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv venv --quiet --clear --python $(OLDEST) build/oldest
	.venv-oldest/bin/uv pip install --quiet --python build/oldest --resolution lowest-direct -e ".[dev]"
	build/oldest/bin/python -m pytest $(TESTS)

TORCH ?= torch==2.13.0
test-newest: export OMP_NUM_THREADS = 1
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(TORCH) -e ".[dev]"
	.venv-newest/bin/python -m pytest $(TESTS)

# Trains the network first unless MODEL=FOLDER names one; called again it goes on where it was.
reproduce-mnist: $(STAMP)
	$(BIN)/python scripts/reproduce.py mnist $(if $(MODEL),--model $(MODEL)) $(FLAGS)

# Faces at 32 and 64, and CIFAR-10: days of a core without a network of your own (docs/natural-images.md); resumable.
reproduce-celeba: $(STAMP)
	$(BIN)/python scripts/reproduce.py celeba-32 $(if $(MODEL),--model $(MODEL)) $(FLAGS)
	$(BIN)/python scripts/reproduce.py celeba-64 $(FLAGS)

reproduce-cifar10: $(STAMP)
	$(BIN)/python scripts/reproduce.py cifar10 $(if $(MODEL),--model $(MODEL)) $(FLAGS)

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
