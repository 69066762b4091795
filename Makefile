# make demo   questions about the pictures in examples/, with the model's answers
# make test   the tests, on a CPU and offline
# make nano   trains the checkpoint in the root again, in about four hours on two idle cores (docs/nano.md)
#
# All create .venv once and reuse it. TORCH is the torch requirement to install: the default is what pip
# takes for this machine, `TORCH=torch==2.13.0` pins a version.
# PYTHON names the interpreter (3.10 or newer), ARGS is passed on.

TORCH ?= torch
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1

KEY := $(firstword $(shell echo '$(TORCH)' | cksum))
DEMO := .venv/.demo-$(KEY)
TEST := .venv/.test-$(KEY)

.PHONY: demo test nano clean

demo: $(DEMO)
	.venv/bin/python examples/demo.py $(ARGS)

test: $(TEST)
	.venv/bin/python -m pytest $(ARGS)

nano: $(DEMO)
	.venv/bin/python -m tools.nano.train dense --steps 1150 --batch 64 --out runs/dense
	.venv/bin/python -m tools.nano.train joint --steps 3500 --start runs/dense/last.pt --out runs/joint
	.venv/bin/python -m tools.nano.train full --steps 2350 --muon-lr 0.012 --start runs/joint/best.pt --out runs/full
	.venv/bin/python -m tools.nano.train export --checkpoint runs/full/best.pt --out .
	.venv/bin/python evaluation/nano_accuracy.py $(ARGS)

clean:
	rm -rf .venv

.venv/.created:
	@test -n '$(PYTHON)' || { echo 'Python 3.10 or newer is needed; name one with PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

$(DEMO): EXTRA := video
$(TEST): EXTRA := dev
$(DEMO) $(TEST): pyproject.toml | .venv/.created
	.venv/bin/python -m pip install --quiet '$(TORCH)'
	.venv/bin/python -m pip install --quiet --editable '.[$(EXTRA)]'
	@touch $@
