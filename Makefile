# Each target builds the virtual environment it needs; nothing has to be installed by hand but Python 3.10 or later.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-comfy bench bench-comfy soak lint format clean

demo: $(READY)  ## three clients share one daemon; pictures, a chart and a table in build/demo
	$(PY) demo/run.py

test: $(READY)  ## every test that needs neither a GPU nor ComfyUI
	$(PY) -m pytest

# ComfyUI's own interpreter runs these: it has ComfyUI's torch. It needs pytest, pytest-timeout and our dependencies.
test-comfy:  ## the tests that need a real ComfyUI: COMFYUI_PATH and COMFYUI_PYTHON say where
	@if [ -z "$$COMFYUI_PATH" ] || [ -z "$$COMFYUI_PYTHON" ]; then \
		echo "make test-comfy needs COMFYUI_PATH (ComfyUI's folder) and COMFYUI_PYTHON (the interpreter that runs it)" >&2; \
		exit 2; \
	fi
	"$$COMFYUI_PYTHON" -m pytest tests/comfy

bench: $(READY)  ## measure, print a table, write build/bench.json
	$(PY) benchmarks/run.py

bench-comfy: $(READY)  ## measure inside a real ComfyUI: COMFYUI_PATH and COMFYUI_PYTHON say where
	$(PY) benchmarks/comfy.py

soak: $(READY)  ## sixteen clients and a fault every twenty seconds, for SOAK_S seconds (600)
	$(PY) benchmarks/soak.py

lint: $(READY)  ## style, types, import directions, spelling; the shape of the package
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell
	$(PY) benchmarks/sizes.py

format: $(READY)  ## fix what the tools can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet '$(TORCH)'
	$(PY) -m pip install --quiet --editable '.[standalone,tray,dev]'
	touch $@

clean:  ## everything that was built
	rm -rf $(VENV) build
