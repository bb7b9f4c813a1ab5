# make demo           one sheet of images for "a red apple" in out/
# make test           the test suite
# make test-browser   the app in a headless Chromium
# make test-ray       a replica of Ray Serve killed under load (after pip install -e ".[ray]")
# make ui             the app on http://127.0.0.1:7860
# make lint           ruff check, ruff format, mypy
# make types          mypy alone
#
# Each builds .venv first when it is missing or out of date. Nothing after the install touches a network.

VENV := .venv
STUDIO := $(VENV)/bin/studio
PYTEST := $(VENV)/bin/python -m pytest
STAMP := $(VENV)/.installed
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
            $(shell $(name) -c 'import sys; print("$(name)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))

export HF_HUB_OFFLINE := 1
export GRADIO_ANALYTICS_ENABLED := False
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-browser test-ray ui lint types install checksums constraints

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || test -n "$(PYTHON)" || \
	  { echo "Studio needs Python 3.11 or newer: install it, or name it with 'make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python'." >&2; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(STUDIO) generate "a red apple" --num-images 4 --sheet --out out/

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "not slow and not browser and not ray and not alone"
	$(PYTEST) -m alone

test-browser: $(STAMP)
	$(PYTEST) -m browser

test-ray: $(STAMP)
	$(PYTEST) -m ray

ui: $(STAMP)
	$(STUDIO) ui

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(MAKE) types

# Mypy reads the package as a wheel lays it out: studio/ with pipelines/, tokenizers/ and ui/ inside.
types: $(STAMP)
	rm -rf typing_tree && mkdir -p typing_tree/studio
	ln -s $(CURDIR)/studio/* $(CURDIR)/pipelines $(CURDIR)/tokenizers $(CURDIR)/ui typing_tree/studio/
	cd typing_tree && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p studio

checksums: $(STAMP)
	$(VENV)/bin/python -c "from studio.checkpoints.bundled import write_checksums; write_checksums()"

constraints: $(STAMP)
	{ sed -n '/^#/p' constraints.txt; \
	  { grep '^ray==' constraints.txt; \
	    $(VENV)/bin/python -m pip freeze --all --exclude-editable | sed -e '/^pip==/d' -e '/^ray==/d' -e 's/+[a-z0-9.]*$$//'; } | \
	  LC_ALL=C sort -f; } > constraints.txt.part
	mv constraints.txt.part constraints.txt
