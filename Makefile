# `make` lists the targets. Each target first sets up what it needs in .venv, if it is not there yet.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
ARGS ?=
MINUTES ?= 10

# rustup installs cargo in this folder, which is not on PATH in every shell.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

SET_UP := $(PYTHON) scripts/environment.py
POSTGRES := $(VENV_PYTHON) scripts/postgres.py --
PGBOUNCER := $(VENV_PYTHON) scripts/pgbouncer.py --
MARIADB := $(VENV_PYTHON) scripts/mariadb.py --
REDIS := $(VENV_PYTHON) scripts/redis_server.py --
# PYTHONMALLOC=malloc: valgrind cannot check memory that Python's own allocator manages. valgrind reports reads and
# writes outside allocated memory. It does not report uninitialized values, because it has false reports in CPython.
MEMCHECK := PYTHONMALLOC=malloc CTXALCHEMY_BACKEND=native valgrind -q --undef-value-errors=no --error-exitcode=3 $(VENV_PYTHON) -I
# The native module is built with AddressSanitizer: on stable Rust, this needs RUSTC_BOOTSTRAP=1. The runtime comes with
# the C compiler. No leaks are detected, because Python does not free at exit what it allocates once.
ASAN := LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 PYTHONMALLOC=malloc \
	PYTHONPATH=target/asan/package CTXALCHEMY_BACKEND=native $(VENV_PYTHON)
EXTENSIONS := python/ctxalchemy/_native*.so python/ctxalchemy/_native*.pyd
LINTERS := ruff-check ruff-format mypy pyright stubtest verifytypes check-workflows rustfmt clippy cargo-test

.DEFAULT_GOAL := help
.PHONY: help test test-lowest test-all coverage wheels memcheck asan lint hooks format docs docs-serve examples demo \
	serve soak failover bench bench-connections bench-gate bench-gate-update clean $(LINTERS)

help:  ## List the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | \
		while IFS="$$(printf '\t')" read -r name text; do \
			printf '  make %-19s%s\n' "$$name" "$$text" | fold -s -w 100 | sed 's/ $$//; 2,$$s/^/                          /'; \
		done
	@echo
	@echo 'Every target runs with python3. To use another interpreter, add for example PYTHON=python3.13.'

test:  ## Run the tests on both backends, with temporary PostgreSQL, PgBouncer and MariaDB servers. ARGS="-k word -x" goes to pytest.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(PGBOUNCER) $(MARIADB) $(VENV_PYTHON) -m pytest -p tests.support.both_backends $(ARGS)

lint:  ## Run all linters, the type checkers and the tests of the Rust crate.
	@$(SET_UP) --need-native test examples bench lint
	@$(MAKE) --no-print-directory --keep-going $(LINTERS)

hooks:  ## Install the Git hook that runs the quick linters before each commit.
	@$(SET_UP) test examples bench lint
	@$(VENV_PYTHON) -m pre_commit install

coverage:  ## Run the tests with coverage of Python and Rust, and write target/coverage/results/lcov.info.
	@$(SET_UP) --need-native test coverage
	@$(POSTGRES) $(VENV_PYTHON) scripts/measure_coverage.py $(ARGS)

test-lowest:  ## Run the tests on the lowest versions that pyproject.toml allows, with CPython 3.11.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(MARIADB) $(VENV_PYTHON) scripts/test_all.py --only lowest $(ARGS)

test-all:  ## Run the tests with every Python of this machine, on SQLAlchemy 2.0 and 2.1 and the lowest versions.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(PGBOUNCER) $(MARIADB) $(VENV_PYTHON) scripts/test_all.py $(ARGS)

wheels:  ## Build the sdist and the wheels for every Python of this machine in dist/, and check them.
	@$(SET_UP) wheels
	@$(VENV_PYTHON) scripts/wheels.py

memcheck:  ## Run the native module under valgrind, which must be installed.
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

format:  ## Format the Python and the Rust, and apply the fixes of the linter.
	@$(SET_UP) --need-native test lint
	$(VENV_PYTHON) -m ruff check --fix-only .
	$(VENV_PYTHON) -m ruff format .
	cargo fmt --all

docs:  ## Build the documentation into site/.
	@$(SET_UP) docs
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --quiet --strict
	@echo 'The documentation is in site/: open site/index.html. Search needs a server: make docs-serve'

docs-serve:  ## Serve the documentation, and rebuild it when it changes.
	@$(SET_UP) docs
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs serve

examples:  ## Run the tests of the examples, of the code in the documentation, and of the pytest plugin.
	@$(SET_UP) --need-native examples
	@$(POSTGRES) $(REDIS) $(VENV_PYTHON) -m pytest examples/tests $(ARGS)

demo:  ## Run the example with SQLite, or with the database of DATABASE_URL.
	@$(SET_UP) demo
	@$(VENV_PYTHON) examples/demo.py

serve:  ## Serve the example application with SQLite, or with the database of DATABASE_URL.
	@$(SET_UP) demo
	@$(VENV_PYTHON) examples/serve.py

soak:  ## Inject random faults for MINUTES=10 on each backend. ARGS="--seed 7" replays a run.
	@$(SET_UP) --need-native test
	@$(POSTGRES) $(PGBOUNCER) $(VENV_PYTHON) tests/soak.py --backend native --minutes $(MINUTES) $(ARGS)
	@$(POSTGRES) $(PGBOUNCER) $(VENV_PYTHON) tests/soak.py --backend python --minutes $(MINUTES) $(ARGS)

failover:  ## Kill and silence a primary under load, promote its standby, and check every write. ARGS="--rounds 5" repeats it.
	@$(SET_UP) --need-native test
	@$(VENV_PYTHON) tests/failover.py --backend native $(ARGS)
	@$(VENV_PYTHON) tests/failover.py --backend python $(ARGS)

bench:  ## Run the benchmarks and write bench/REPORT.md and bench/TARGETS.md. ARGS="--quick micro" runs a part of them.
	@$(SET_UP) --need-native bench
	@$(POSTGRES) $(VENV_PYTHON) -m bench $(ARGS)

bench-connections:  ## Count the server connections of four workers, with and without PgBouncer.
	@$(SET_UP) --need-native bench
	@$(POSTGRES) $(PGBOUNCER) $(VENV_PYTHON) -m bench.connections

bench-gate:  ## Fail if the hot path or a request executes more instructions than committed for this Python.
	@$(SET_UP) --need-native bench
	@$(POSTGRES) $(VENV_PYTHON) -m bench.instructions

bench-gate-update:  ## Update the committed instruction ratios of this Python.
	@$(SET_UP) --need-native bench
	@$(POSTGRES) $(VENV_PYTHON) -m bench.instructions --update

clean:  ## Remove .venv and everything that was built.
	rm -rf .venv target dist site .mypy_cache .pytest_cache .ruff_cache $(EXTENSIONS)
	find bench build_backend examples python scripts tests -name __pycache__ -prune -exec rm -rf {} +

# The parts of `make lint`. They need a .venv that `make lint` or `make hooks` has set up.

ruff-check:
	$(VENV_PYTHON) -m ruff check .

ruff-format:
	$(VENV_PYTHON) -m ruff format --check .

mypy:
	$(VENV_PYTHON) -m mypy --strict

pyright:
	$(VENV_PYTHON) -m pyright --pythonpath $(VENV_PYTHON)

# Compare the stub of the native module with the module.
stubtest:
	$(VENV_PYTHON) -m mypy.stubtest ctxalchemy._native

# Check that everything public has a declared type. pyright uses the package of the `python` on PATH.
verifytypes:
	PATH="$(CURDIR)/.venv/bin:$$PATH" python -m pyright --ignoreexternal --verifytypes ctxalchemy

# Check the security of the GitHub workflows, and the schemas of the files in .github.
check-workflows:
	.venv/bin/zizmor --offline --quiet --no-progress --min-severity=medium .github
	.venv/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv/bin/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	.venv/bin/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

rustfmt:
	cargo fmt --all --check

clippy cargo-test: export PYO3_PYTHON := $(CURDIR)/$(VENV_PYTHON)

clippy:
	cargo clippy --all-targets -- -D warnings

cargo-test:
	cargo test
