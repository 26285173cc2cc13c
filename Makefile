# `make table1` and `make test` do all their set-up from a fresh clone: environment, assets, run.
PYTHON ?= python3
PROFILE ?= auto
RESULTS := $(or $(BESA_RESULTS),results)
ITEMS := $(patsubst reproduce/%.ipynb,%,$(sort $(wildcard reproduce/*.ipynb)))
REFERENCE := $(sort $(wildcard results/reference/*/*.ipynb))

.PHONY: venv venv-newest lock $(ITEMS) reproduce $(REFERENCE) reference report book test test-gpu lab clean

venv: .venv/installed

# The lock only constrains: a build of torch for CPUs, where pip finds one, counts as the same version, and then what is
# locked for CUDA is not installed. Compiled at once, on all cores (pip takes one): where PYTHONDONTWRITEBYTECODE is set,
# as images of containers have it, every process would compile again. A few files do not parse.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile --constraint requirements.lock --editable '.[notebooks,dev,docs]'
	.venv/bin/python -m compileall -qq -j 0 -x /tests/ .venv/lib || true
	touch $@

# The newest versions that pyproject.toml admits, instead of the locked ones.
venv-newest:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[notebooks,dev,docs]'
	touch .venv/installed

# Write down what pyproject.toml now asks for; UPGRADE=--upgrade takes the newest version of everything.
lock:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet uv
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate $(UPGRADE) \
		--custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

# Last comes what was written, beside the reference numbers under results/reference.
$(ITEMS): venv
	.venv/bin/python reproduce/execute.py $(RESULTS)/$@/$@.ipynb "profile: $(PROFILE)"
	.venv/bin/python reproduce/page.py --results $(RESULTS) --show $@

# One after the other; a failing notebook stops no other and shows in the exit status. Finished rows are skipped.
reproduce: PROFILE := quick
reproduce:
	$(MAKE) -k -j1 $(ITEMS) PROFILE=$(PROFILE); status=$$?; \
		.venv/bin/python reproduce/page.py --results $(RESULTS) && exit $$status

# What is committed, each notebook with the parameters that it ran with: rows that have a record are not computed again,
# and the same bytes are left. Those of packed were measured by two threads.
reference: $(REFERENCE)
	.venv/bin/python reproduce/page.py

results/reference/packed/packed.ipynb: export OMP_NUM_THREADS := 2
$(REFERENCE): venv
	.venv/bin/python reproduce/execute.py $@

# The report of what came with the repository.
report: venv
	.venv/bin/python reproduce/page.py

# The site, in build/book: tutorials, report, executed notebooks, reference; nothing is executed, every warning fails.
book: venv
	.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir reproduce/book . build/book
	cp build/book/README.html build/book/index.html

# What takes longest comes first, notebooks and the file of checkpoints: at the end one process would wait for the other.
LONG := tests/test_shards.py
test: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	BESA_PROFILE=smoke BESA_RESULTS=$$(mktemp -d) OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder --nbval-lax --nbval-current-env \
		reproduce notebooks $(LONG) $(filter-out $(LONG), $(sort $(wildcard tests/test_*.py)))

# What is marked gpu, then one block of each shape against its floor: a table and records under results/cost.
test-gpu: venv
	.venv/bin/python -c 'import torch; torch.cuda.is_available() or exit("make test-gpu: torch finds no GPU here")'
	.venv/bin/python -m pytest -m gpu tests
	mkdir -p $(RESULTS)/cost
	.venv/bin/papermill reproduce/cost.ipynb $(RESULTS)/cost/gpu.ipynb --log-output -p profile $(PROFILE) \
		-p shapes llama-7b,llama2-70b -p methods besa-row-wise
	.venv/bin/python reproduce/page.py --results $(RESULTS) --show cost

lab: venv
	.venv/bin/jupyter lab --notebook-dir .

clean:
	rm -rf .venv build
