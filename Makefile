# Two commands are all a fresh Linux machine with Python >= 3.11 needs: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Two workers with one thread each, on every machine: more threads than cores would wait for one another, and each worker
# holds 3 GB at times. `make test WORKERS=8` where there is room.
WORKERS ?= 2
# Always python -m: the first line of a console script breaks where the path has a space.
RUN := $(VENV)/bin/python -m

.PHONY: demo test quick check docs env clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "creating $(VENV): about 7 GB and a few minutes, once"
	"$(PYTHON)" -m venv --clear $(VENV)
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[train,export,ort,rtx,audio,video,plot,nvml,triton,docs,dev]'
	$(RUN) pip check --disable-pip-version-check
	@touch $@

# Once per environment, while there is a network anyway: do the devices' Pythons find wheels for all of the base install?
$(VENV)/.resolved: pyproject.toml $(VENV)/.installed
	$(VENV)/bin/python scripts/check_base_install.py
	@touch $@

demo: env
	$(RUN) examples.demo

check: env
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy

docs: env
	$(RUN) mkdocs build --strict

# The one that is done first takes tests from the other: some last seconds, most none.
test: check docs $(VENV)/.resolved
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal

# For the inner loop, under a minute: all that needs no training, no export and no environment of its own.
quick: env
	$(RUN) ruff check .
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal tests/device tests/model tests/test_layering.py tests/test_project.py \
		--ignore tests/device/test_old_environment.py --deselect tests/model/test_losses.py::test_two_processes_share_one_importance

clean:
	rm -rf runs bundles data build *.egg-info
