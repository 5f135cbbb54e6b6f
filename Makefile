# Tools are run as modules, so that they are those of the active environment.
PYTHON ?= python

# Two pytest workers share the cores: more threads in each would only make them wait for one another.
export OMP_NUM_THREADS ?= 1

.PHONY: check check-portable check-versions site test web format demo

check:  ## what the continuous checks run
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	@if command -v npm >/dev/null || [ "$$CI" = true ]; then $(MAKE) web; else echo "no npm: web/ is not checked"; fi
	$(PYTHON) -m pytest -n 2 --dist worksteal
	$(MAKE) site
	$(MAKE) check-portable

check-portable:  ## parity as on CPUs without AVX-512 and AMX, and as on those with hardly any vector instructions
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTHON) -m pytest -q -n 2 tests/parity
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default $(PYTHON) -m pytest -q -n 2 tests/parity

site:  ## the documentation as a site in build/site, its examples executed; anything wrong is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

check-versions:  ## fast tests with every claimed Python, and the oldest and newest libraries; needs uv and downloads GB
	$(PYTHON) tests/version_matrix.py

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal

web:  ## the page of web/, built into web/dist
	cd web && npm ci --no-audit --no-fund && npm run check && npm run build

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

demo:
	$(PYTHON) -m diffusers_far.cli demo
