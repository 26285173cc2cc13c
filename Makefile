# `make table1` and `make test` do all their set-up from a fresh clone: environment, assets, run.
PYTHON ?= python3
PROFILE ?= auto

.PHONY: venv table1 table2 table3 table4 cost test lab clean

venv: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[notebooks,dev]'
	touch $@

table1 table2 table3 table4 cost: venv
	mkdir -p results/$@
	.venv/bin/papermill reproduce/$@.ipynb results/$@/$@.ipynb -p profile $(PROFILE) --log-output

test: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	BESA_PROFILE=smoke .venv/bin/python -m pytest --nbval-lax --nbval-current-env tests reproduce notebooks

lab: venv
	.venv/bin/jupyter lab --notebook-dir .

clean:
	rm -rf .venv
