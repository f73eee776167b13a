# pilotbed: `make` lists what there is to do.
.DEFAULT_GOAL := help
.ONESHELL:
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
LAB := .venv/bin/python -m pilotbed.lab
PYTEST := .venv/bin/python -m pytest
.PHONY: help lab walk status shell logs destroy snapshot restore test lint unit grid test-relay test-glexec
.PHONY: bench bench-relay bench-glexec ready

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-28s %s\n", $$1 ($$1 == "shell" || $$1 == "logs" ? " NODE=submit" : $$1 ~ /snapshot|restore/ ? " NAME=x" : ""), $$2}' Makefile

ready:
	@./bootstrap

lab: ready ## everything: host, image, nodes, the grid on them, and the walk
	@$(LAB) lab

walk: ready ## alice and bob each run a job, once more on the running grid
	@$(LAB) walk

status: ready ## nodes, services, pilots and jobs at a glance
	@$(LAB) status

shell: ready ## a root shell on a node
	@$(LAB) shell "$(NODE)"

logs: ready ## the logs that matter for a node's roles
	@$(LAB) logs "$(NODE)"

destroy: ready ## remove the lab: no mount, namespace, cgroup, process or bridge stays
	@$(LAB) destroy

snapshot: ready ## keep every node as it is now
	@$(LAB) snapshot "$(NAME)"

restore: ready ## every node back as it was, and a walk
	@$(LAB) restore "$(NAME)"

test: lint unit test-glexec grid test-relay ## lint, unit, service, glexec and grid tests, and the ways through

lint: ready ## ansible-lint, yamllint, ruff, mypy, shellcheck
	@tests/lint

unit: ready ## decisions, services and the lab's own life, without a grid
	@$(PYTEST) tests/unit tests/services tests/lab

test-glexec: ready ## glexec and the mapping service on a worker of their own: table, attacks, faults, fuzz; without a grid
	@$(PYTEST) tests/glexec

grid: ready ## the running grid, asked as its users do (boots the lab first, if need be)
	@$(LAB) up && $(PYTEST) tests/grid

test-relay: ready ## every way through the firewalls, and faults on them (boots the nodes of inventory/traversal, too)
	@export ANSIBLE_INVENTORY=inventory/common,inventory/lab,inventory/traversal
	$(LAB) up && $(PYTEST) tests/traversal

bench: ready ## how long, how much: var/bench.json
	@$(LAB) bench

bench-relay: ready ## the relay beside other ways through: var/bench-relay.json, docs/relay.md
	@$(LAB) bench-relay

bench-glexec: ready ## glexec beside sudo, mapping service, pilotbed-trace: var/bench-glexec.json, docs
	@$(LAB) bench-glexec
