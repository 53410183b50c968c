# Foothold. `make help` lists what there is.

GO       ?= go
STATE    ?= build/lab
FUZZTIME ?= 10s
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo development)

# Static binaries with no path of this machine in them: the same source gives the same bytes.
BUILD = CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

# Packages whose tests need the machine's tools, VMs or the whole lab, and take minutes.
SYSTEM = $(shell grep -rl --include='*_test.go' '^//go:build system' . | xargs -r -n1 dirname | sort -u)

FOOTHOLD = bin/foothold
export FOOTHOLD_CONTEXT = $(abspath $(STATE))/context.yaml

.PHONY: help build deps lab test unit system faults fuzz bench down clean

help:
	@echo "make build   binaries in bin/"
	@echo "make lab     the whole system on this machine, and a first VM"
	@echo "make test    every test: unit tests with the race detector, each fuzz target briefly, whole-system tests"
	@echo "make faults  every daemon killed in every act of a VM; takes twenty minutes"
	@echo "make fuzz    every fuzz target for FUZZTIME (10s, or 5000x) each, one after the other"
	@echo "make bench   measurements, as a table and as bench.json; ONLY=EXPRESSION takes some (-help: which)"
	@echo "make down    end the lab"
	@echo "make clean   end the lab and remove bin/ and build/"

build:
	@mkdir -p bin
	$(BUILD) -o bin/ ./cmd/...
	$(BUILD) -o bin/sample-web ./lab/sample/web

# What the machine lacks: packages by apt (as root, by sudo, or it prints the line).
deps: build
	@$(FOOTHOLD) lab preflight --mend

lab: deps
	@$(FOOTHOLD) lab up --state $(STATE)
	@$(FOOTHOLD) lab first --state $(STATE) --workload bin/sample-web

test: deps unit
	@$(MAKE) --no-print-directory fuzz FUZZTIME=5000x
	@$(MAKE) --no-print-directory system

# Half of what the tests of some packages do is wait for daemons: four packages at a time.
unit:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not formatted:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags system ./...
	$(GO) test -race -p 4 -timeout 20m ./...

# The whole system by itself: it has daemons beside its VMs. Of the others two at a time, each
# with one VM.
system: build
	$(GO) test -tags system -count=1 -timeout 40m ./e2e
	$(GO) test -tags system -count=1 -p 2 -timeout 40m $(filter-out ./e2e,$(SYSTEM))

faults: deps
	FOOTHOLD_FAULTS=all $(GO) test -tags system -count=1 -timeout 90m -run TestFaults -v ./e2e

# FUZZTIME may be a number of executions, as in `make test`: 5000x. What a target finds lies
# in its package's testdata/fuzz, and fails every later `go test`.
fuzz:
	@grep -r --include='*_test.go' '^func Fuzz' . | sed 's|/[^/]*_test.go:func \(Fuzz[A-Za-z0-9_]*\)(.*| \1|' | sort | \
	while read -r package target; do \
		echo "$$package $$target"; \
		$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$package" </dev/null || exit 1; \
	done

bench: deps
	$(GO) run ./e2e/bench $(if $(ONLY),-only '$(ONLY)')

down:
	@test ! -x $(FOOTHOLD) || $(FOOTHOLD) lab down --state $(STATE)

clean: down
	rm -rf bin build bench.json
