# tierd: `make demo` and `make test` do all of their own set-up on a fresh Debian 12 as root.
SHELL := /bin/bash
VENV := build/venv
PY := $(VENV)/bin/python
STAMP := build/.installed
C_SOURCES := $(wildcard tierd/native/*.c tierd/native/*.h tierd/native/build.py)

.PHONY: demo test test-machine test-guests test-daemon test-beside bench torture soak build lint setup install clean kernels test-kernels bench-kernels

build: $(STAMP)

# The virtual environment and the extension, rebuilt when a dependency or the C code changes.
$(STAMP): pyproject.toml setup.py $(C_SOURCES)
	@tests/setup.sh build
	@test -x $(PY) || python3 -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --upgrade pip "setuptools>=77" wheel
	@$(VENV)/bin/pip install --quiet --editable '.[dev]'
	@touch $@

setup: build
	@tests/setup.sh vm

# The main job on a real guest; JSON=1 ends with one JSON object on the last line. MEMORY=anon: with QEMU's default memory; TIERS=redis, TIERS=memory,redis,file: other tiers.
demo: setup
	@$(if $(findstring redis,$(TIERS)),tests/setup.sh stores)
	@$(VENV)/bin/tierd --config config/tierd.yaml demo --directory build/vm $(if $(JSON),--json) $(if $(filter anon,$(MEMORY)),--backing anonymous) $(if $(TIERS),--tiers $(TIERS))

test: setup
	@tests/beside.sh 0 "$(MAKE) lint" tests/setup.sh libvirt metrics stores disks boot
	@tests/beside.sh 19 "$(MAKE) test-beside" $(MAKE) -j1 --no-print-directory test-machine test-kernels

# tests/kernel changes what the machine is set to (huge pages, large folios, swap), one test after the other and no guest of another's
# beside it. Of the rest, those with real guests, and the benchmark, run beside the others: much of the time both wait.
test-machine: build
	$(PY) -m pytest -q tests/kernel $(ARGS)
	@tests/beside.sh 0 "$(MAKE) test-guests" $(MAKE) --no-print-directory test-daemon

GUESTS := tests/vm tests/boot tests/bench tests/daemon/test_every_tier.py
test-guests: build
	$(PY) -m pytest -q $(GUESTS) $(ARGS)

test-daemon: build
	$(PY) -m pytest -q $(addprefix --ignore=,$(GUESTS)) $(filter-out $(GUESTS) $(BESIDE) tests/kernel tests/kernels,$(patsubst %/,%,$(dir $(wildcard tests/*/__init__.py)))) $(ARGS)

# What waits for servers of its own, and then what only computes: no test in there minds how long it takes.
BESIDE := tests/store tests/pure tests/native
test-beside: build
	$(PY) -m pytest -q $(BESIDE) $(ARGS)

# Kernels that have the engines' interfaces, and Debian's own: built or unpacked once, into ~/.cache/tierd/kernels.
kernels:
	@nice python3 -m tests.kernels.build

# What the native interfaces cost beside the bare calls, in kernels that have them: ratios, it is an emulation.
bench-kernels: build kernels
	$(PY) -m tests.kernels.bench $(ARGS)

# The tests that boot them: two at once, all of one class by one process. Beside them nothing that is not at
# niceness 19: their guests have clocks. Those of arm64 are in `make soak`.
test-kernels: setup kernels
	$(PY) -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder --ignore=tests/kernels/test_arm64.py tests/kernels $(ARGS)

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror tierd/native/*.c tierd/native/*.h $(wildcard tests/*/*.c tests/*/*.h tierd/*/*.c)
	@for source in $(wildcard tests/*/*.c tierd/demo/*.c); do \
		gcc -std=gnu11 -fsyntax-only -Wall -Wextra -Werror $(addprefix -I,tierd/native $(wildcard tests/*/)) $$source || exit 1; done

bench: setup
	@tests/setup.sh stores
	$(PY) -m tests.bench.bench $(ARGS)

# tierd is killed KILLS times at random moments under guests that check every byte, and as often where they have three tiers (compressed
# memory, a file, a store that is asked); writes
# build/torture.json and torture-ladder.json.
KILLS ?= 1000
SEED ?= 1
torture: build
	$(PY) -m tests.kernel.torture --kills $(KILLS) --seed $(SEED)
	$(PY) -m tests.kernel.torture --kills $(KILLS) --seed $(SEED) --ladder

# The long runs: more seeds, more kills.
soak: setup
	TIERD_SEEDS=200000 TIERD_REAL_SEEDS=20000 TIERD_KILLS=1000 TIERD_INJECT_KILLS=10000 $(PY) -m pytest -q tests/native tests/kernel $(ARGS)
	TIERD_KILLS=2000 $(PY) -m pytest -q tests/store/test_objects.py $(ARGS)
	TIERD_DEFAULTS_S=720 $(PY) -m pytest -q tests/vm/test_tiered.py $(ARGS)
	$(PY) -m tests.kernels.build arm64-6.1 arm64-6.12
	TIERD_REQUIRE=arm64 TIERD_ARM64_KILLS=300 $(PY) -m pytest -q tests/kernels/test_arm64.py $(ARGS)
	TIERD_EXAMPLES=20000 $(PY) -m pytest -q tests/pure/test_fuzz.py tests/native/test_state_fuzz.py tests/daemon/test_fuzz.py

# A venv under /opt/tierd, units, an example configuration, the udev rule. Changes nothing in /etc/tierd that is there.
install:
	@tests/setup.sh build
	python3 -m venv /opt/tierd
	/opt/tierd/bin/pip install --quiet .
	install -d -m 0755 /etc/tierd /etc/tierd/guests.d
	test -e /etc/tierd/tierd.yaml || install -m 0644 config/tierd.yaml /etc/tierd/tierd.yaml
	install -m 0644 config/guests.d/example.yaml /etc/tierd/guests.d/example.yaml.sample
	install -D -m 0644 systemd/tierd.service /etc/systemd/system/tierd.service
	install -D -m 0644 systemd/tierd-user.service /etc/systemd/user/tierd-user.service
	install -D -m 0644 systemd/tierd.sysusers.conf /etc/sysusers.d/tierd.conf
	install -D -m 0644 systemd/tierd.tmpfiles.conf /etc/tmpfiles.d/tierd.conf
	install -D -m 0644 systemd/99-tierd-userfaultfd.rules /etc/udev/rules.d/99-tierd-userfaultfd.rules
	ln -sf /opt/tierd/bin/tierd /usr/local/bin/tierd
	@if [ -d /run/systemd/system ]; then systemd-sysusers; systemd-tmpfiles --create; systemctl daemon-reload; fi
	@echo "Now edit /etc/tierd/tierd.yaml, then: systemctl enable --now tierd"

clean:
	rm -rf build tierd/native/_native.c tierd/native/*.so
