# Every command of the project. Nothing is written outside target/, but for Debian packages that `setup` installs.
SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
programs := target/x86_64-unknown-linux-gnu/release

.PHONY: help demo test setup build artifacts lint fuzz bench bench-lab lab-shell clean rust

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: rust ## sixteen forks of a Debian guest, from nothing; in the lab where this host cannot
	@demo/run

test: rust setup ## every test, in the lab where this host cannot
	@tests/run

setup: rust ## install the Debian packages that are missing
	@fixtures/artifacts/setup -q

build: rust setup ## the four programs, static, in target/x86_64-unknown-linux-gnu/release
	@cargo build --locked --release -p forkling-daemon -p forkling-vmm -p forkling-agent

artifacts: setup ## guest kernel, Debian root, the lab
	@fixtures/artifacts/fetch-kernel
	@fixtures/artifacts/build-root debian
	@fixtures/lab/build

lint: rust setup ## formatting, clippy, documentation, licences
	@fixtures/lint

fuzz: rust setup ## what hostile guests send, a minute of each target
	@fixtures/fuzz

bench: build ## figures of the null guest on this host's KVM beside their baselines, and the page of all figures
	@cargo build --locked --release --workspace --bins
	@bench/run native

bench-lab: build artifacts ## figures of Debian forks in lab time, the same on any host
	@cargo build --locked --release --workspace --bins
	@bench/run lab

lab-shell: build ## a shell on the emulated machine, with the programs on its PATH
	@fixtures/lab/run --shell --env PATH=/lab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	    $(foreach program,forkd forkling forkling-vmm forkling-agent,--in $(programs)/$(program):/lab/bin/$(program))

clean: ## remove target/, all that was built and fetched
	@rm -rf target

rust:
	@command -v cargo >/dev/null || { echo "make: there is no cargo on the PATH; install Rust (https://rustup.rs)" >&2; exit 1; }
