# pilotbed: `make` lists what there is to do. LAB=name means another lab than the one called lab, INVENTORY=mini a lab of
# that name, of inventory/mini.
.DEFAULT_GOAL := help
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -e -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Lessons are about the grid that fits a laptop.
ifneq ($(filter lesson hint check reset,$(MAKECMDGOALS)),)
INVENTORY ?= mini
endif
ifdef INVENTORY
$(if $(wildcard inventory/$(INVENTORY)/hosts.yml),,$(error INVENTORY=$(INVENTORY): there is no inventory/$(INVENTORY)/hosts.yml))
export ANSIBLE_INVENTORY := inventory/common,inventory/$(INVENTORY)
endif
export LAB ?= $(or $(INVENTORY),lab)
lab := .venv/bin/python -m pilotbed_lab
walk := .venv/bin/python -m pilotbed_suite.walk
bench := .venv/bin/python -m pilotbed_bench
training := .venv/bin/python -m pilotbed_training
part := .venv/bin/python -m pilotbed_suite.parts
.PHONY: help lab boot walk status shell logs labs destroy snapshot restore
.PHONY: test lint unit services test-lab test-glexec mini grid traversal ready
.PHONY: lesson hint check reset test-training test-certification
.PHONY: ready-test certify soak test-ha box test-vagrant molecule matrix bench bench-claims bench-relay bench-glexec bench-pilots

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-28s %s\n", $$1 ($$1 == "shell" || $$1 == "logs" ? " NODE=submit" : $$1 ~ /snapshot|restore/ ? " NAME=x" : $$1 ~ /^(lesson|hint|check)$$/ ? " N=03" : ""), $$2}' Makefile

ready:
	@./bootstrap

ready-test:
	@./bootstrap test

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

lesson: ready ## the grid in the state of a lesson, and its story (docs/course.md)
	@$(training) lesson -- "$(N)"

hint: ready ## one more hint for the lesson
	@$(training) hint -- "$(N)"

check: ready ## what of the lesson is mended, what is not, and what else is broken
	@$(training) check -- "$(N)"

reset: ready ## the healthy grid back after a lesson
	@$(training) reset

test: ready-test ## everything (CHANGED=1: but for parts that passed and see no change since)
	@$(part) $(if $(CHANGED),--changed)

unit: ready-test
lint services mini grid traversal: ready
lint unit services mini grid traversal:
	@$(part) $@

test-lab test-glexec test-training test-certification: ready
	@$(part) $(@:test-%=%)

# Each is a part of the suite: suite/src/pilotbed_suite/parts.py
lint: ## ansible-lint, yamllint, ruff, mypy, shellcheck
unit: ## decisions, without I/O; inventories and roles
services: ## a real server or pilot, started inside the test
test-lab: ## the life of a lab of two nodes, and of two labs
test-glexec: ## glexec and the mapping service on a worker of their own: table, attacks, faults, fuzz; without a grid
test-training: ## every lesson: its fault in, another solution, its own; deploys inventory/mini first
test-certification: ## every fault that the certificate must find, planted in the lab and taken back
mini: ## the grid on three machines, in a lab of its own: services that share hosts
grid: ## the running grid, asked as its users do (boots the lab first, if need be)
traversal: ## every way through the firewalls, and faults on them (boots the nodes of inventory/traversal, too)

certify: ready ## the checks of the certificate against the running grid (CHECKS=Q3 or an id: a part): docs/certification.md
	@.venv/bin/python -m pilotbed_suite.certify --checks "$(CHECKS)"

box: ## Vagrant boxes of the node image, or BOX=plain, into var/box (BOX_SERVER=http://…: where others fetch them): docs/vagrant.md
	@./bootstrap box
	mkdir -p var/log
	.venv/bin/python -m pilotbed_lab.box

test-vagrant: box ## mini on virtual machines (BOX=plain: all by apt), walked, rebooted, walked: without KVM up to two hours
	@./bootstrap test vagrant
	timeout 7200 tests/vagrant/ground .venv/bin/python -m pytest -s tests/vagrant

soak: ready ## MINUTES=30 of JOBS=5000 short jobs and a fault each minute, on the lab: every job once, flat memory, clean workers
	@$(lab) up
	MINUTES=$(or $(MINUTES),30) JOBS=$(or $(JOBS),5000) .venv/bin/python -m pytest -s tests/soak

test-ha: ready ## two of a kind, either of which loses its power while jobs run, in a lab of its own: docs/ha.md
	@export LAB=ha ANSIBLE_INVENTORY=inventory/common,inventory/lab,inventory/ha; \
	$(lab) up && .venv/bin/python -m pytest -s tests/ha && $(lab) destroy

molecule: ready ## every scenario, LANES=3 at a time (SCENARIO=name: that one): docs/molecule.md
	@$(if $(SCENARIO),molecule test --scenario-name $(SCENARIO),$(part) --scenarios $(or $(LANES),3))

matrix: ready ## what glexec's key tests have shown under each batch system, into docs/batch-systems.md
	@.venv/bin/python -m pilotbed_suite.matrix

bench: ready ## how long, how much: var/bench.json
	@$(bench) grid

bench-claims: ready ## what it costs that claims end, on a deployed lab: docs/glidein.md
	@$(bench) claims

bench-relay: ready ## the relay beside other ways through: var/bench-relay.json, docs/relay.md
	@$(bench) relay

bench-pilots: ready ## frontend, factory and pilots at production scale; the second half deploys the lab: docs/scale.md
	@$(bench) pilots
	@$(bench) pilots-grid

bench-glexec: ready ## glexec beside sudo, mapping service, pilotbed-trace: var/bench-glexec.json, docs
	@$(bench) glexec
