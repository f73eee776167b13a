# pilotbed: `make` lists what there is to do. LAB=name means another lab than the one called lab.
.DEFAULT_GOAL := help
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -e -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export LAB ?= lab
lab := .venv/bin/python -m pilotbed_lab
walk := .venv/bin/python -m pilotbed_suite.walk
bench := .venv/bin/python -m pilotbed_bench
part := .venv/bin/python -m pilotbed_suite.parts
.PHONY: help lab boot walk status shell logs labs destroy snapshot restore
.PHONY: test lint unit services test-lab test-glexec small grid traversal ready
.PHONY: molecule matrix bench bench-claims bench-relay bench-glexec

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-28s %s\n", $$1 ($$1 == "shell" || $$1 == "logs" ? " NODE=submit" : $$1 ~ /snapshot|restore/ ? " NAME=x" : ""), $$2}' Makefile

ready:
	@./bootstrap

lab: ready ## everything: host, image, nodes, the grid on them, and the walk
	@$(lab) up
	$(walk)

boot: ready ## image and nodes, without the grid on them
	@$(lab) boot

walk: ready ## alice and bob each run a job, once more on the running grid
	@$(walk)

status: ready ## nodes, services, pilots and jobs at a glance
	@$(lab) status

shell: ready ## a root shell on a node
	@$(lab) shell "$(NODE)"

logs: ready ## the logs that matter for a node's roles
	@$(lab) logs "$(NODE)"

labs: ready ## the labs of this host, whichever checkout's
	@$(lab) list

destroy: ready ## remove the lab (ALL=1: all labs of this checkout): no mount, namespace, cgroup, process or bridge stays
	@$(lab) destroy $(if $(ALL),--all)

snapshot: ready ## keep every node as it is now
	@$(lab) snapshot "$(NAME)"

restore: ready ## every node back as it was, and a walk
	@$(lab) restore "$(NAME)"
	$(walk)

test: ready ## everything (CHANGED=1: but for parts that passed and see no change since)
	@$(part) $(if $(CHANGED),--changed)

lint unit services small grid traversal: ready
	@$(part) $@

test-lab test-glexec: ready
	@$(part) $(@:test-%=%)

# Each is a part of the suite: suite/src/pilotbed_suite/parts.py
lint: ## ansible-lint, yamllint, ruff, mypy, shellcheck
unit: ## decisions, without I/O; inventories and roles
services: ## a real server or pilot, started inside the test
test-lab: ## the life of a lab of two nodes, and of two labs
test-glexec: ## glexec and the mapping service on a worker of their own: table, attacks, faults, fuzz; without a grid
small: ## a grid on two nodes, in a lab of its own: services that share hosts
grid: ## the running grid, asked as its users do (boots the lab first, if need be)
traversal: ## every way through the firewalls, and faults on them (boots the nodes of inventory/traversal, too)

molecule: ready ## every scenario, one after the other (SCENARIO=name: that one): docs/molecule.md
	@molecule test $(if $(SCENARIO),--scenario-name $(SCENARIO),--all)

matrix: ready ## what glexec's key tests have shown under each batch system, into docs/batch-systems.md
	@.venv/bin/python -m pilotbed_suite.matrix

bench: ready ## how long, how much: var/bench.json
	@$(bench) grid

bench-claims: ready ## what it costs that claims end, on a deployed lab: docs/glidein.md
	@$(bench) claims

bench-relay: ready ## the relay beside other ways through: var/bench-relay.json, docs/relay.md
	@$(bench) relay

bench-glexec: ready ## glexec beside sudo, mapping service, pilotbed-trace: var/bench-glexec.json, docs
	@$(bench) glexec
