# `make` lists the targets.  Every one sets up what it needs in .venv first, and does so only once.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
ARGS ?=
MINUTES ?= 10

# Where rustup puts cargo, if the shell does not know it already.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

SET_UP := $(PYTHON) scripts/environment.py
POSTGRES := $(VENV_PYTHON) scripts/postgres.py --
# With the allocator of C, because valgrind cannot see into Python's own.  Reads and writes of what is not allocated
# are reported; not values that are not set, which it also sees where CPython itself is right.
MEMCHECK := PYTHONMALLOC=malloc CTXALCHEMY_BACKEND=native valgrind -q --undef-value-errors=no --error-exitcode=3 $(VENV_PYTHON) -I
# The same with AddressSanitizer built in, which stable Rust does on RUSTC_BOOTSTRAP=1; its runtime is that of the C
# compiler.  Python itself is not built for it, and leaves to the system what it allocates once.
ASAN := LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 PYTHONMALLOC=malloc \
	PYTHONPATH=target/asan/package CTXALCHEMY_BACKEND=native $(VENV_PYTHON)
EXTENSIONS := python/ctxalchemy/_native*.so python/ctxalchemy/_native*.pyd
LINTERS := ruff-check ruff-format mypy pyright stubtest verifytypes rustfmt clippy cargo-test

.DEFAULT_GOAL := help
.PHONY: help test test-all wheels memcheck asan lint format docs docs-serve examples demo serve soak bench bench-gate bench-gate-update clean $(LINTERS)

help:  ## List the targets.
	@echo 'PYTHON=python3.13 picks the interpreter, wherever the default python3 is not the one to use.'
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

test:  ## Run the tests on both backends, with a throw-away PostgreSQL.  ARGS="-k word -x" goes to pytest.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(VENV_PYTHON) -m pytest -p tests.support.both_backends $(ARGS)

lint:  ## Run all linters and type checkers, on the Python and the Rust.
	@$(SET_UP) --need-native test examples bench lint
	@$(MAKE) --no-print-directory --keep-going $(LINTERS)

test-all:  ## Run the tests with every Python at hand, on SQLAlchemy 2.0 and 2.1, and print a table.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(VENV_PYTHON) scripts/test_all.py $(ARGS)

wheels:  ## Build the sdist and all wheels for the interpreters at hand, in dist, and check them.
	@$(SET_UP) wheels
	@$(VENV_PYTHON) scripts/wheels.py

memcheck:  ## Run the native module under valgrind, which has to be installed.
	@$(SET_UP) --need-native test
	$(MEMCHECK) tests/isolated/flat.py 200
	$(MEMCHECK) tests/isolated/cycles.py
	$(MEMCHECK) tests/isolated/open_at_exit.py

asan: export PYO3_PYTHON := $(CURDIR)/$(VENV_PYTHON)
asan:  ## Run the native module with AddressSanitizer, whose runtime comes with gcc.
	@$(SET_UP) --need-native test
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address PYO3_BUILD_EXTENSION_MODULE=1 cargo rustc --lib \
		--crate-type cdylib --target "$$(rustc -vV | sed -n 's/^host: //p')" --target-dir target/asan
	rm -rf target/asan/package
	mkdir target/asan/package
	cp -r python/ctxalchemy target/asan/package
	rm -f target/asan/package/ctxalchemy/_native*.so
	cp target/asan/*/debug/libctxalchemy.so target/asan/package/ctxalchemy/_native.so
	$(ASAN) tests/isolated/flat.py 10000
	$(ASAN) tests/isolated/cycles.py
	$(ASAN) tests/isolated/open_at_exit.py

format:  ## Format the Python and the Rust, and fix what the linter can.
	@$(SET_UP) --need-native test lint
	$(VENV_PYTHON) -m ruff check --fix-only .
	$(VENV_PYTHON) -m ruff format .
	cargo fmt --all

docs:  ## Build the documentation into site/.
	@$(SET_UP) docs
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --quiet --strict

docs-serve:  ## Show the documentation, and build it anew when it changes.
	@$(SET_UP) docs
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs serve

examples:  ## Run the tests of the examples, of the documentation's code, and of the pytest plugin.
	@$(SET_UP) --need-native examples
	@$(POSTGRES) $(VENV_PYTHON) -m pytest examples/tests $(ARGS)

demo:  ## Run the example, over SQLite or over DATABASE_URL.
	@$(SET_UP) demo
	@$(VENV_PYTHON) examples/demo.py

serve:  ## Serve the example application, over SQLite or over DATABASE_URL.
	@$(SET_UP) demo
	@$(VENV_PYTHON) examples/serve.py

soak:  ## Random faults for MINUTES=10 on each backend.  ARGS="--seed 7" replays.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(VENV_PYTHON) tests/soak.py --backend native --minutes $(MINUTES) $(ARGS)
	@$(POSTGRES) $(VENV_PYTHON) tests/soak.py --backend python --minutes $(MINUTES) $(ARGS)

bench:  ## Run the benchmarks and write bench/REPORT.md.  ARGS="--quick micro" picks.
	@$(SET_UP) --need-native bench
	@$(POSTGRES) $(VENV_PYTHON) -m bench $(ARGS)

bench-gate:  ## Fail where the hot path executes 3% more instructions than committed.
	@$(SET_UP) --need-native bench
	@$(VENV_PYTHON) -m bench.instructions

bench-gate-update:  ## Renew the committed instruction ratios of this Python.
	@$(SET_UP) --need-native bench
	@$(VENV_PYTHON) -m bench.instructions --update

clean:  ## Remove everything that was built, the environment included.
	rm -rf .venv target dist site .mypy_cache .pytest_cache .ruff_cache $(EXTENSIONS)
	find python scripts tests examples -name __pycache__ -prune -exec rm -rf {} +

# The parts of `make lint`, which sets up what they need.

ruff-check:
	$(VENV_PYTHON) -m ruff check .

ruff-format:
	$(VENV_PYTHON) -m ruff format --check .

mypy:
	$(VENV_PYTHON) -m mypy --strict

pyright:
	$(VENV_PYTHON) -m pyright --pythonpath $(VENV_PYTHON)

# The stub of the native module, against the module as it was built.
stubtest:
	$(VENV_PYTHON) -m mypy.stubtest ctxalchemy._native

# Everything public has a type that is written down.  It looks for the package of the `python` on PATH.
verifytypes:
	PATH="$(CURDIR)/.venv/bin:$$PATH" python -m pyright --ignoreexternal --verifytypes ctxalchemy

rustfmt:
	cargo fmt --all --check

clippy cargo-test: export PYO3_PYTHON := $(CURDIR)/$(VENV_PYTHON)

clippy:
	cargo clippy --all-targets -- -D warnings

cargo-test:
	cargo test
