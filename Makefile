# katapy on Debian 12 and 13: `make run` and `make test` do the set-up themselves. `make help` lists the rest.

PREFIX ?= /usr/local
DESTDIR ?=
LIBRARY := $(DESTDIR)$(PREFIX)/lib/katapy
DATA_DIR := /var/lib/katapy
BENCH ?= --docs
NODE_IMAGE ?= localhost/katapy-node
# Debian's own, the same as the guest's.
PYTHON ?= /usr/bin/python3
BIN := .venv/bin
LAB_RELEASE ?= bookworm
LAB = PYTHONPATH=images:tests $(BIN)/python tests/lab/run.py --release $(LAB_RELEASE)
PROTOC := $(BIN)/python -m grpc_tools.protoc
export PYTHON

HELLO := examples/hello
PROGRAMS := /usr/bin/qemu-system-x86_64 /usr/lib/qemu/virtiofsd /usr/bin/mmdebstrap /usr/bin/mkfs.erofs /bin/busybox
INSTALLED := katapy containerd-shim-katapy-v2
RECIPE := $(filter-out %/__pycache__,$(wildcard images/* default-root/* guest-agent/init guest-agent/katapy_agent/*.py))

# A stamp is of no use where what it stands for has gone, or is another now: then FORCE does the work again.
gone = $(if $(strip $(wildcard $(1))),,FORCE)
# The environment's programs name their Python by its path.
moved := $(if $(findstring $(CURDIR)/$(BIN)/,$(file <$(BIN)/pip)),,FORCE)
# The image's stamp holds the names of what went in.
removed := $(if $(filter-out $(RECIPE),$(file <build/image)),FORCE)
# The example's configuration holds the host's kernel.
rebooted := $(if $(findstring HOST_KERNEL=$(file </proc/sys/kernel/osrelease)",$(file <$(HELLO)/config.json)),,FORCE)

.PHONY: run setup test unit lab lab-bench lab-shell soak bench lint format proto image node-image guest-kernel install uninstall clean help FORCE
.DELETE_ON_ERROR:

run: setup $(HELLO)/config.json ## set up, then run examples/hello in a virtual machine
	@$(BIN)/katapy run --bundle $(HELLO) hello

setup: build/packages .venv/installed build/image ## packages, virtual environment, guest image and kernel, default root

build/packages: scripts/setup $(foreach program,$(PROGRAMS),$(call gone,$(program)))
	@scripts/setup packages
	@touch $@

.venv/installed: pyproject.toml build/packages $(call gone,$(BIN)/katapy) $(moved)
	@scripts/setup venv
	@touch $@

build/image: .venv/installed $(RECIPE) $(removed) $(foreach asset,image kernel root,$(call gone,$(DATA_DIR)/$(asset)/*/$(asset).json))
	@$(BIN)/katapy image build
	@echo $(RECIPE) > $@

$(HELLO)/config.json: build/packages $(wildcard /bin/busybox) $(addprefix $(HELLO)/,prepare hello.sh config.json.in) \
		$(call gone,$(HELLO)/rootfs/bin/hello) $(rebooted)
	@$(HELLO)/prepare

test: setup ## all tests but the long ones, and lint; as root
	@scripts/setup test-tools
	@rm -f build/results/*
	@$(BIN)/python scripts/all_tests.py

unit: .venv/installed ## the tests that need no root and no virtual machine
	@$(BIN)/pytest -q -m 'not root and not vm and not soak' tests/unit

lab: setup ## the tests of features that the hardware path has, on an emulated host with KVM; LAB_RELEASE=trixie; as root
	@$(LAB)

lab-bench: setup ## what KVM and the kernel's vsock are worth, as ratios; on that host
	@scripts/setup bench-tools
	@$(LAB) --bench

lab-shell: setup ## a shell on that host
	@$(LAB) --shell

soak: setup ## the long tests; as root
	@$(BIN)/pytest -q -m soak tests
	@unshare --mount --propagation private $(BIN)/pytest -q -m 'not soak' tests/functional --starts cold --seldom

bench: setup ## measure, and write docs/performance.md; BENCH='--quick --only start' and more: bench/run.py; as root
	@scripts/setup bench-tools
	@$(BIN)/python bench/run.py $(BENCH)

lint: .venv/installed ## ruff, mypy --strict, the layers
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@for code in 'katapy guest-agent/katapy_agent' images default-root guest-kernel bench scripts examples guest-agent/tests conftest.py tests/conftest.py $(filter-out %/__pycache__/,$(wildcard tests/*/)); do \
		$(BIN)/mypy --no-error-summary $$code || exit 1; done
	@PYTHONPATH=guest-agent $(BIN)/lint-imports --no-logo

format: .venv/installed ## let ruff mend what it can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

proto: .venv/installed ## generate the messages from the .proto files
	@for package in katapy/proto guest-agent/katapy_agent; do \
		$(PROTOC) --proto_path=guest-agent/proto --python_out=$$package --pyi_out=$$package agent.proto || exit 1; done
	@$(PROTOC) --proto_path=katapy/proto --python_out=katapy/proto --pyi_out=katapy/proto $(notdir $(wildcard katapy/proto/*.proto))

image: build/image ## the guest image, Debian's kernel and the default root, in /var/lib/katapy

node-image: ## the container image that installs katapy on nodes of Kubernetes; with buildah; NODE_IMAGE=name NODE_BASE=debian
	buildah build --file deploy/Containerfile $(if $(NODE_BASE),--build-arg "BASE=$(NODE_BASE)") --tag "$(NODE_IMAGE)" .

guest-kernel: .venv/installed ## a tuned guest kernel from Debian's source; minutes
	@scripts/setup kernel-tools
	@PYTHONPATH=images $(BIN)/python guest-kernel/tuned.py

install: build/packages ## katapy under PREFIX, with an environment of its own
	$(PYTHON) -m venv --clear "$(LIBRARY)"
	"$(LIBRARY)/bin/python" -m pip install --quiet --disable-pip-version-check .
	find "$(LIBRARY)/share" -name __pycache__ -prune -exec rm -rf {} +
	@# The programs name the Python that will run them: where they will be, not where a package is put together.
	mkdir -p "$(DESTDIR)$(PREFIX)/bin"
	for program in $(INSTALLED); do \
		sed -i '1s|^#!$(DESTDIR)|#!|' "$(LIBRARY)/bin/$$program" && \
		ln -sfn "../lib/katapy/bin/$$program" "$(DESTDIR)$(PREFIX)/bin/$$program" || exit 1; done

uninstall: ## remove what `make install` has put under PREFIX
	rm -rf "$(LIBRARY)"
	rm -f $(foreach program,$(INSTALLED),"$(DESTDIR)$(PREFIX)/bin/$(program)")

clean: ## remove all that was made in this directory; /var/lib/katapy stays
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf examples/hello/rootfs examples/hello/config.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
