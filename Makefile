# make lab PY=python3.12    with a Python of your choice
# make lab ARGS=--no-browser
PY ?= python3
BIN = .venv/bin
# for glibc: keep freed memory, so that no call is timed while the system hands out fresh pages
KEEP_PAGES = MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000

.PHONY: lab test install prepare notebooks studies bench doctor lint

lab: install
	@$(BIN)/python -m effnlp_lessons lab $(ARGS)

test: install
	@$(BIN)/python -m effnlp_lessons test

install:
	@$(PY) -m effnlp_lessons install

prepare: install
	@$(BIN)/python -m effnlp_lessons prepare

notebooks: prepare
	$(BIN)/python notebooks/build.py build $(ARGS)

# ARGS names the study: make studies ARGS=teacher
studies: prepare
	$(BIN)/python -m effnlp_lessons.studies $(ARGS)

bench: prepare
	@$(KEEP_PAGES) $(BIN)/python -m pytest -q -s tests/benchmarks

doctor: install
	@$(BIN)/python -m effnlp_lessons doctor || true

lint: install
	$(BIN)/python -m ruff check
	$(BIN)/lint-imports --no-logo
