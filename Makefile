# `make table1` and `make test` do everything from a fresh clone: environment, models and texts, run.
PYTHON ?= python3
PROFILE ?= auto
RESULTS := $(or $(BESA_RESULTS),results)
ITEMS := $(patsubst reproduce/%.ipynb,%,$(sort $(wildcard reproduce/*.ipynb)))
REFERENCE := $(sort $(wildcard results/reference/*/*.ipynb))

.PHONY: venv venv-newest lock $(ITEMS) reproduce $(REFERENCE) reference report book lint fast test test-gpu lab clean

venv: .venv/installed

# About 2 GB and two minutes of work, plus the downloads.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --no-compile --constraint requirements.lock --editable '.[all]'
	.venv/bin/python -m compileall -qq -j 0 -x /tests/ .venv/lib || true  # on all cores; pip takes one
	touch $@

# Newest versions that pyproject.toml admits.
venv-newest:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --upgrade --upgrade-strategy eager --editable '.[all]'
	touch .venv/installed

# UPGRADE=--upgrade takes the newest version of everything.
lock:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet uv
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate $(UPGRADE) \
		--custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

# Run a notebook and print its tables. Finished rows are skipped.
$(ITEMS): venv
	.venv/bin/python -m reproduce.execute $(RESULTS)/$@/$@.ipynb "profile: $(PROFILE)"
	.venv/bin/python -m reproduce.page --results $(RESULTS) --show $@

# All notebooks; a failing one does not stop the others.
reproduce: PROFILE := quick
reproduce:
	$(MAKE) -k -j1 $(ITEMS) PROFILE=$(PROFILE)

# Execute the committed notebooks again from their records, which gives the same bytes.
reference: $(REFERENCE)
	.venv/bin/python -m reproduce.page

$(REFERENCE): venv
	.venv/bin/python -m reproduce.execute $@

# Write reproduce/README.md and the tables of README.md.
report: venv
	.venv/bin/python -m reproduce.page

# Build the site in build/book.
book: venv
	.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir reproduce/book . build/book
	cp build/book/README.html build/book/index.html

# The longest files come first, so that both processes end at about the same time.
LONG := $(wildcard tests/test_notebooks.py tests/test_checkpoint.py)
PYTEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15
test: lint book
	$(PYTEST) $(LONG) $(filter-out $(LONG), $(sort $(wildcard tests/test_*.py)))
	$(PYTEST) --nbval-lax --nbval-current-env notebooks

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

# Under a minute, while you work: no embedded model, no notebooks.
FAST := command package masks importance baselines besa exact losses walk decoder verdicts tables report
fast: lint
	$(PYTEST) $(wildcard $(patsubst %, tests/test_%.py, $(FAST)))

# Memory and time of one block of each size, beside the estimates of reproduce/gpu.csv.
test-gpu: venv
	.venv/bin/python -m pytest -m gpu tests
	.venv/bin/python -m reproduce.execute $(RESULTS)/cost/gpu.ipynb "{profile: $(PROFILE), \
		shapes: [llama-7b, llama2-70b], methods: [wanda, sparsegpt, besa-row-wise, exact, exact-update]}"
	.venv/bin/python -m reproduce.page --results $(RESULTS) --show cost

lab: venv
	.venv/bin/jupyter lab --notebook-dir .

clean:
	rm -rf .venv build
