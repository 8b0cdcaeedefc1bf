# Two commands: `make quickstart [SEED=0]` and `make test`. Both set up .venv first (once).
# Where pip does not find CPU wheels of torch by itself: make quickstart PIP_ARGS="--extra-index-url <PyTorch's CPU index>"
SEED ?= 0
PYTHON ?= python3
PIP_ARGS ?=
PY := .venv/bin/python
DATA := data/quickstart/seed$(SEED)
NAME := $(if $(filter 0,$(SEED)),quickstart,quickstart-seed$(SEED))

SEED_FILES := model.path=$(DATA)/model data.train_files=[$(DATA)/train.parquet] sft.files=[$(DATA)/warmup.parquet] \
	evaluation.files=[$(DATA)/heldout.parquet] evaluation.without_tool_files=[$(DATA)/heldout_direct.parquet]

.PHONY: quickstart test test-units test-integration setup lint clean

quickstart: .venv/.ready
	$(PY) examples/quickstart/prepare_data.py --seed $(SEED) --out $(DATA)
	$(PY) -m megatron_agent.train examples/quickstart/run.yaml name=$(NAME) seed=$(SEED) $(SEED_FILES) $(ARGS)

# Two halves side by side, of about the same time: both wait a lot, for processes to start and for each other.
test: .venv/.ready lint
	$(MAKE) -j2 test-units test-integration

test-units: .venv/.ready
	$(PY) -m pytest -q tests --ignore=tests/integration

test-integration: .venv/.ready
	$(PY) -m pytest -q tests/integration

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup: .venv/.ready

.venv/.ready: setup.py tools/torchvision_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q $(PIP_ARGS) -e '.[cpu,dev]'
	@# CUDA builds that cannot be imported beside a CPU torch, and that vLLM imports when it finds them
	@$(PY) -c 'import torch; raise SystemExit(torch.version.cuda is not None)' && $(PY) -m pip uninstall -q -y torchaudio torchcodec || true
	@$(PY) tools/torchvision_cpu.py
	@touch $@

clean:
	rm -rf .venv build *.egg-info
