# make lab PY=python3.12    with a Python of your choice
# make lab ARGS=--no-browser
PY ?= python3
BIN = .venv/bin

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
	@if [ -d tests/benchmarks ]; then $(BIN)/python -m pytest -q -s tests/benchmarks; \
	else echo "There are no benchmarks yet: tests/benchmarks is missing."; fi

doctor: install
	@$(BIN)/python -m effnlp_lessons doctor || true

lint: install
	$(BIN)/python -m ruff check
	$(BIN)/lint-imports --no-logo
