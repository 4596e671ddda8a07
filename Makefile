PYTHON ?= python3
WORKDIR ?= runs/demo
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-all lint bench clean

install: $(STAMP)

$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 12) or sys.exit("make: expected Python 3.11 or 3.12, found %d.%d; name one with PYTHON=" % v)'
	@echo "installing into .venv (about a minute)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

demo: install  ## train, evaluate and sample a small model on Python's own source text
	$(BIN)/python -m allattn train --config=configs/demo.py --workdir=$(WORKDIR)
	$(BIN)/python -m allattn generate --workdir=$(WORKDIR) --prompt="def " --length=300 --temperature=0.7 --seed=1

test: install  ## everything that is quick; CI runs this
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist worksteal

test-all: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## training speed against this machine's own matrix product
	for geometry in tiny small-8; do for spans in full zero mixed; do \
	  $(BIN)/python -m benchmarks.train --geometry=$$geometry --spans=$$spans; done; done

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info
