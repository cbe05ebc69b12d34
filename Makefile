# The front door. Set-up is tools/setup, the build is CMake's presets; see CONTRIBUTING.md.
.PHONY: demo test test-all build dist wheel bench format lint asan fuzz clean
ARGS ?=
LABELS ?= -LE long
FUZZ_SECONDS ?= 30
SOURCES = $(shell git ls-files '*.cpp' '*.h')
# clang-tidy takes a minute a file, most of it in LibTorch's headers: by default only files that differ from HEAD.
LINT ?= $(shell git diff --name-only --diff-filter=d HEAD -- 'moesaic/*.cpp' 'cli/*.cpp')

demo: ## install what is missing, build, run the main job on a real model
	@echo "make demo: on two cores about 20 minutes of set-up and build where there is none yet, then 10 minutes of demo"
	tools/setup demo
	$(MAKE) --no-print-directory build/moesaic
	build/moesaic demo $(ARGS)

test: ## install what the tests need, build, run every test but those that take long
	tools/setup test
	cmake --preset release
	cmake --build --preset release
	$(MAKE) --no-print-directory wheel
	ctest --test-dir build --output-on-failure -j "$$(nproc)" $(LABELS) $(ARGS)

test-all: LABELS =
test-all: test ## those that take long, too

build: ## leaves the program at build/moesaic
	tools/setup build
	$(MAKE) --no-print-directory build/moesaic

.PHONY: build/moesaic
build/moesaic:
	cmake --preset release
	cmake --build --preset release --target moesaic_cli

dist: ## build/dist/moesaic-VERSION-linux-x86_64.tar.zst: a folder that runs without Python or installation
	tools/setup build
	$(MAKE) --no-print-directory build/moesaic
	rm -rf build/dist && mkdir build/dist
	.venv/bin/python tools/third_party.py --texts build/dist/licenses
	cd build/dist && cmake -DPROGRAM=../moesaic -DLICENSES=licenses -DVERSION="$$(../moesaic --version | cut -d' ' -f2)" -P ../../cmake/Dist.cmake
	rm -rf build/dist/licenses
	cat build/dist/SHA256SUMS

wheel: ## build/wheel/moesaic-VERSION-py3-none-manylinux_*.whl: the Python package and the program, for any Python
	tools/setup wheel
	cmake --preset release
	cmake --build --preset release --target moesaic_wheel_program
	rm -rf build/wheel
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir build/wheel/plain .
	PATH="$(CURDIR)/.venv/bin:$$PATH" LD_LIBRARY_PATH="$$(echo $(CURDIR)/.venv/lib/python3*/site-packages/pyarrow)" auditwheel repair build/wheel/plain/*.whl --strip --zip-compression-level 9 --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' --exclude 'libgomp*' --wheel-dir build/wheel
	rm -rf build/wheel/plain

bench: ## whole jobs against their peers; writes bench/results/ and bench/RESULTS.md
	tools/setup bench
	cmake --preset release -DMOESAIC_BENCH=ON
	cmake --build --preset release
	.venv/bin/python bench/run.py $(ARGS)

format: ## clang-format over every source
	tools/setup lint
	clang-format-19 -i $(SOURCES)

lint: ## formatting, layering, and clang-tidy on LINT (default: changed files); changes nothing
	tools/setup lint
	clang-format-19 --dry-run -Werror $(SOURCES)
	.venv/bin/python tests/layering_test.py
	cmake --preset release
	printf '%s\n' $(LINT) | xargs -r -P "$$(nproc)" -n 1 clang-tidy-19 -p build --quiet

asan: ## unit tests under AddressSanitizer and UBSan
	tools/setup sanitize
	cmake --preset asan
	cmake --build --preset asan --target unit_tests
	ctest --test-dir build-asan -L unit --output-on-failure $(ARGS)

fuzz: ## every fuzz target for FUZZ_SECONDS
	tools/setup sanitize
	cmake --preset asan -DMOESAIC_FUZZ_SECONDS=$(FUZZ_SECONDS)
	cmake --build --preset asan --target fuzz_targets
	ctest --test-dir build-asan -L fuzz --output-on-failure $(ARGS)

clean: ## removes build trees; .venv and .cache stay
	rm -rf build build-asan build-dev
