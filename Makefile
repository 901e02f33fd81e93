# Everything runs in .venv, made from constraints.txt. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROCESSES ?= 2

.PHONY: install demo serve check test wheel docs constraints clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "lora-sweeps needs Python 3.11 to 3.13; found %d.%d: make PYTHON=python3.12 $(MAKECMDGOALS)" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/lora-sweeps run examples/digits.yaml

serve: install
	$(BIN)/lora-sweeps serve --with-mlflow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py

# A file's tests stay in one process; the files that take longest come first (tests/conftest.py).
test: install
	$(BIN)/pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

wheel: install
	$(BIN)/python -m build --wheel

docs: install
	$(BIN)/python docs/make_spec.py
	$(BIN)/python docs/make_law.py
	$(BIN)/python docs/make_export.py
	$(BIN)/python docs/make_tasks.py
	$(BIN)/python docs/make_service.py

# Pins every package of a fresh environment. Local version suffixes such as +cpu are dropped, so that the file names no one build.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet torch==2.13.0
	build/constraints/bin/python -m pip install --quiet '.[dev]' ray==2.60.0 optuna==5.0.0 mlflow==3.17.2 pydantic==2.14.3 transformers==5.23.0 peft==0.21.2
	build/constraints/bin/python -m pip freeze --exclude lora-sweeps | sed 's/+[a-z0-9.]*$$//' > constraints.txt

clean:
	rm -rf build dist *.egg-info
