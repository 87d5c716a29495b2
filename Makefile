# The main commands are `make demo` and `make test`. Every target that runs Python sets up .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*.* csrc/cuda/sm90/* bindings/*)

.PHONY: demo test test-oldest-triton evaluation lint bench readme sanitize fuzz properties faults clean

# Threads that wait passively: two that spin beside other work take 25 times as long over the toy model's small layers.
demo: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m lr_kernels demo
	$(BIN)/python -m benchmarks --quick

# Two workers run whole test files at a time, since the tests of a file may share what is costly to make; the order is
# that of tests/conftest.py. Each worker has one thread, since spinning OpenMP threads of two workers slow each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed
	$(PYTEST) tests

# The oldest Triton that the package supports; `make test` runs with the newest. All kernels are compiled. Of attention
# the cases that have everything are interpreted, of its gradients those in 16 bits, since the interpreter takes minutes
# for all.
OLDEST_TRITON := $(VENV)/triton-3.6
test-oldest-triton: $(VENV)/.installed
	test -d $(OLDEST_TRITON) || $(BIN)/python -m pip install -q --target $(OLDEST_TRITON) "triton==3.6.*" "numpy<2.4"
	PYTHONPATH=$(OLDEST_TRITON) $(PYTEST) -k "everything and not (test_triton_backward.py and float32) or not (test_triton.py or test_triton_backward.py)" \
		$(wildcard tests/test_triton*.py) tests/test_compact_keys.py

properties: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_properties.py --hypothesis-profile thorough --hypothesis-show-statistics

# Every fault of the list planted in the kernel for Hopper; `make test` plants an eighth.
faults: $(VENV)/.installed
	$(BIN)/python tests/hopper_faults.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks --cases attention backward --flex --scaling --csv benchmarks/results/cpu.csv
	$(BIN)/python -m benchmarks --cases operators --csv benchmarks/results/operators.csv
	$(BIN)/python -m benchmarks --cases references backend --repeats 15 --csv benchmarks/results/transformers.csv
	$(BIN)/python -m benchmarks --cases masks --repeats 9 --csv benchmarks/results/masks.csv
	$(BIN)/python -m benchmarks.many --csv benchmarks/results/many.csv
	$(BIN)/python -m benchmarks.eight_bit --csv benchmarks/results/eight_bit.csv
	$(BIN)/python -m benchmarks --cases sweep --csv benchmarks/results/scaling.csv
	$(BIN)/python -m benchmarks.plots

readme: $(VENV)/.installed
	$(BIN)/python -m benchmarks.readme

# The full evaluation of the toy world, half an hour on two cores; README's table of the method is made of it.
evaluation: $(VENV)/.installed
	$(BIN)/python -m benchmarks.toy

lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q "ruff==0.17.*" "mypy==2.*" "clang-format==23.*"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy lr_kernels
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'bindings/*' 'tests/emulator/*')

# Tests of the C++ kernels, and of the emulator for Hopper, on builds of their own, with addresses and undefined behaviour checked; g++ only. The preloaded
# C++ library lets the sanitizer see torch's exceptions; Python's own memory counts as leaks, so those are off. A report
# ends the process and must not be in pytest's capture file then. A forked process can wait forever for a lock of the
# sanitizer's allocator, so the test of a DataLoader's workers is left out.
# The test files of the operators, which have a function `right_call`, and those of rules that hold for all operators.
SANITIZED := $(shell grep -l "^def right_call" tests/test_*.py) $(addprefix tests/test_,direct_calls.py errors.py ops.py properties.py step_blend_arguments.py)
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(name).so))
SANITIZED_PYTHON = cd build/sanitize/lib && PYTHONPATH=. LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python
EMULATOR := export CMAKE_ARGS="-DLR_SANITIZE=avx2 -DCMAKE_CXX_COMPILER=g++" LR_EMULATOR_BUILD=build/sanitize/emulator;
.PHONY: sanitized
sanitized: $(VENV)/.installed
	isa=$$($(BIN)/python -c "from lr_kernels.info import instruction_set as isa; print(isa())") && \
	CMAKE_ARGS="-DLR_SANITIZE=$$isa -DCMAKE_CXX_COMPILER=g++" $(BIN)/python setup.py -q build \
		--build-temp build/sanitize/objects --build-lib build/sanitize/lib
sanitize: sanitized
	$(EMULATOR) $(BIN)/python tests/emulated.py
	$(EMULATOR) $(SANITIZED_PYTHON) -m pytest -p no:cacheprovider --capture=sys \
		$(CURDIR)/tests/test_hopper.py $(CURDIR)/tests/test_hopper_eight_bit.py
	$(SANITIZED_PYTHON) -m pytest -p no:cacheprovider --capture=sys -m "not fault(number=29) and not fault(number=44)" \
		-k "not dataloader_worker" $(SANITIZED:%=$(CURDIR)/%)

# Direct calls of the ops with wrong arguments, on the same build: each must raise an error or succeed.
fuzz: sanitized
	$(SANITIZED_PYTHON) $(CURDIR)/tests/direct_calls.py 20000

# The build runs in the environment that has torch, so that the extension is built against the torch it will meet.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=77" wheel "cmake>=3.18,<4.5" ninja
	$(BIN)/python -m pip install -q "$(TORCH)" numpy
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[triton,diffusers,bench,test,evaluation]"
	touch $@

clean:
	rm -rf $(VENV) build hf_kernel/build lr_kernels/_C.so lr_kernels/_build.json outputs
