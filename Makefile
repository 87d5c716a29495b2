# Two commands: `make demo` and `make test`. Both set up everything in .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PUBLIC := $(addprefix lr_kernels/,$(addsuffix .py,__init__ attention backends checks info masks ops plan reference step_blend token_maps))
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/cpu/* bindings/*)

.PHONY: demo test lint bench readme clean

demo: $(VENV)/.installed
	$(BIN)/python -m lr_kernels demo
	$(BIN)/python -m benchmarks --quick

test: $(VENV)/.installed
	$(BIN)/python -m pytest tests

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks --csv benchmarks/results/cpu.csv

readme: $(VENV)/.installed
	$(BIN)/python -m benchmarks.readme

lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q "ruff==0.17.*" "mypy==2.*" "clang-format==23.*"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy --follow-imports=silent $(PUBLIC)
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'bindings/*')

# The build runs in the environment that has torch, so that the extension is built against the torch it will meet.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=77" wheel "cmake>=3.18,<4.5" ninja
	$(BIN)/python -m pip install -q "$(TORCH)" numpy
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[triton,diffusers,bench,test]"
	touch $@

clean:
	rm -rf $(VENV) build lr_kernels/_C.so lr_kernels/_build.json outputs
