# Tools are run as modules, so that they are those of the active environment.
PYTHON ?= python

# Two pytest workers share the cores: more threads in each would only make them wait for one another.
export OMP_NUM_THREADS ?= 1

.PHONY: check test format demo

check:  ## what the continuous checks run
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -n 2

test:
	$(PYTHON) -m pytest -n 2

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

demo:
	$(PYTHON) -m diffusers_far.demo
