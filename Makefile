# Two commands are all a fresh Linux machine with Python >= 3.11 needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check env clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "creating $(VENV): about 7 GB and a few minutes, once"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,export,ort,rtx,audio,video,plot,nvml,triton,docs,dev]'
	$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

# Once per environment, while there is a network anyway: do the devices' Pythons find wheels for all of the base install?
$(VENV)/.resolved: pyproject.toml $(VENV)/.installed
	$(BIN)/python scripts/check_base_install.py
	@touch $@

demo: env
	$(BIN)/python -m examples.demo

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check $(VENV)/.resolved
# Two workers with one thread each: more threads than cores would wait for one another. The one that is done first takes
# tests from the other: some last seconds, most none.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf runs bundles data build *.egg-info
