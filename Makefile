# Everything a developer does, from a fresh clone on; each target sets up .venv by itself when that is needed.
#
#   make run      the terminal with a kernel of its own      make run ARGS="--existing"
#   make test     the whole suite                            make test ARGS="test_session test_client"
#   make check    linter and type checker
#   make bench    figures beside ipykernel's                 make bench ARGS=--full
#   make soak     the long campaigns
#   make clean    all that the above left behind
#
# PYTHON names the interpreter .venv is made with (3.10 or newer): make PYTHON=python3.12 test

ARGS =
PYTHON ?=
venv = @sh .ci/venv
python = .venv/bin/python

.PHONY: run test check bench soak clean
# One .venv, set up by one at a time.
.NOTPARALLEL:

run:
	$(venv) run $(PYTHON)
	@$(python) -m twoproc.frontend $(ARGS)

test:
	$(venv) test $(PYTHON)
	@$(python) -m test $(ARGS)

check:
	$(venv) dev $(PYTHON)
	$(python) -m ruff check .
	$(python) -m mypy

bench:
	$(venv) bench $(PYTHON)
	@$(python) -m bench $(ARGS)

soak:
	$(venv) test $(PYTHON)
	@$(python) -m soak $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
