# Variables become flags: make train DATA=geoqa REWARD=frequency ARGS="--temperature 0.8"
DATA   ?= shapes
MODEL  ?=
REWARD ?=
ADVANTAGE ?=
STEPS  ?=
SEED   ?=
REWARDS ?=
SEEDS  ?=
OUT    ?=
RUN    ?=
BENCH  ?=
IMAGE  ?=
QUESTION ?=
GPUS   ?= 1
ARGS   ?=
TORCH  ?= torch==2.13.0
PYTHON ?= python3

# Has the name of our folder kernels/. The tests make sure that both work together; nothing else needs it.
NAMESAKE := 'kernels>=0.16,<0.19'

VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready-$(subst /,-,$(subst =,-,$(TORCH)))
TINY   := models/tiny
TAUGHT := boxed think-boxed judge-tiny ask-direct ask-in-context
# A flag with the blank before it, or nothing, so that what make prints is as one would type it.
flag    = $(if $(2), --$(1) "$(2)")
MORE    = $(if $(ARGS), $(ARGS))
# The embedded model is warmed up when it is what will be used.
comma  := ,
DRAWN  := shapes shapes-hard
NEEDS_TINY = $(if $(MODEL),$(filter $(TINY),$(patsubst %/,%,$(MODEL))),$(filter $(DRAWN) $(DRAWN:%=%:%),$(subst $(comma), ,$(DATA))))
MODEL_READY = $(if $(NEEDS_TINY),$(TINY)/warmup.json)
SAMPLING = --data "$(DATA)"$(call flag,model,$(MODEL))$(call flag,seed,$(SEED))
PROCESSES = $(call flag,gpus,$(filter-out 1,$(GPUS)))
# A run brings its own model, seed and held-out data; what is given here goes before them.
OF_RUN = --run "$(RUN)"$(if $(filter file,$(origin DATA)),,$(call flag,data,$(DATA)))$(call flag,model,$(MODEL))$(call flag,seed,$(SEED))

SCRIPTS := train_upt.py rollout.py judge.py rewards.py synthesize.py warmup.py ablate.py report.py ask.py check_data.py export.py
CODE    := $(SCRIPTS) upt kernels eval bench examples notebooks tests

# The variables that each target uses. Another one on the command line is a mistake, which make itself would pass over.
USES_train   := DATA MODEL REWARD ADVANTAGE STEPS SEED OUT GPUS ARGS
USES_rollout := DATA MODEL STEPS SEED OUT GPUS ARGS
USES_judge   := MODEL OUT GPUS ARGS
USES_score   := REWARD ADVANTAGE SEED OUT ARGS
USES_eval    := DATA MODEL SEED OUT RUN BENCH GPUS ARGS
USES_synth   := DATA MODEL SEED OUT GPUS ARGS
USES_ablate  := DATA MODEL REWARDS ADVANTAGE STEPS SEEDS OUT GPUS ARGS
USES_export  := RUN OUT ARGS
USES_report  := RUN OUT ARGS
USES_runs    := ARGS
USES_ask     := RUN MODEL IMAGE QUESTION ARGS
USES_check-data := DATA SEED OUT ARGS
USES_results := ARGS
USES_warmup  := SEED ARGS
USES_test    := ARGS
USES_test-trl := ARGS
USES_test-extras := ARGS
USES_bench   := ARGS
GOALS  := $(or $(MAKECMDGOALS),help)
TAKES  := $(sort $(foreach goal,$(GOALS),$(USES_$(goal))))
GIVEN  := $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$v))
UNUSED := $(filter-out $(TAKES) PYTHON TORCH,$(filter-out MAKE% -%,$(GIVEN)))
UPPER  := $(shell echo '$(UNUSED)' | tr a-z A-Z)
NEAR   := $(firstword $(filter $(TAKES),$(UPPER) $(UPPER:%S=%) $(UPPER:%=%S)))
ifneq ($(UNUSED),)
$(error make $(GOALS) does not use $(UNUSED)$(if $(NEAR), (did you mean $(NEAR)?)); it takes $(or $(TAKES),no variables))
endif

.DEFAULT_GOAL := help
Makefile: ;
.DEFAULT:
	@echo "error: there is no target $@; make lists them" >&2; exit 2

.PHONY: help setup warmup train rollout judge score eval synth ablate report runs ask check-data export results test test-trl test-extras lint bench bench-gpu clean

help:  ## this list
	@echo "make TARGET [DATA=shapes] [MODEL=] [REWARD=] [ADVANTAGE=] [STEPS=] [SEED=] [REWARDS=] [SEEDS=] [OUT=] [RUN=] [BENCH=] [IMAGE=] [QUESTION=] [GPUS=1] [ARGS=...]"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1	/' | expand -t 12

setup: $(READY)  ## virtual environment in .venv with all requirements

$(READY): requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "installing the packages of requirements.txt into $(VENV): some minutes"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/beside $(NAMESAKE)
	rm -f $(VENV)/.ready-*
	touch $@

$(TINY)/warmup.json: warmup.py $(wildcard upt/warmup/*.py) upt/data/shapes.py $(TAUGHT:%=prompts/%.md) | $(READY)
	$(PY) warmup.py --out $(TINY)$(call flag,seed,$(SEED))

warmup: $(READY)  ## (re)make the embedded default model in models/tiny
	$(PY) warmup.py --out $(TINY)$(call flag,seed,$(SEED))$(MORE)

# An error then says which of its flags are variables here (upt/run/cli.py).
warmup train rollout judge score eval synth ablate export report runs ask check-data: export UPT_BY_MAKE = $(USES_$@)

train: $(READY) $(MODEL_READY)  ## label-free training with a before/after table (GPUS=4: on all of a node; on a CPU: processes)
	$(PY) train_upt.py $(SAMPLING)$(call flag,reward,$(REWARD))$(call flag,advantage,$(ADVANTAGE))$(call flag,steps,$(STEPS)) \
	  --out "$(or $(OUT),runs/train)"$(PROCESSES)$(MORE)

rollout: $(READY) $(MODEL_READY)  ## sample responses into shards
	$(PY) rollout.py $(SAMPLING)$(call flag,steps,$(STEPS)) --out "$(or $(OUT),runs/rollouts)"$(PROCESSES)$(MORE)

judge: $(READY)  ## a frozen judge's scores for the shards in runs/rollouts (ARGS="--rollouts DIR" for others)
	$(PY) judge.py --rollouts runs/rollouts$(call flag,model,$(MODEL)) --out "$(or $(OUT),runs/judged)"$(PROCESSES)$(MORE)

score: $(READY)  ## rewards and advantages for the shards in runs/rollouts (ARGS="--rollouts DIR" for others)
	$(PY) rewards.py --rollouts runs/rollouts --reward "$(or $(REWARD),majority)" \
	  --advantage "$(or $(ADVANTAGE),group-norm)"$(call flag,seed,$(SEED)) --out "$(or $(OUT),runs/scored)"$(MORE)

eval: $(READY) $(if $(RUN),,$(MODEL_READY))  ## held-out accuracy of a model; with BENCH=mathvision (or all) DATA=DIR [RUN=runs/train], a benchmark's
ifneq ($(BENCH),)
	@test -z '$(filter $(DRAWN),$(DATA))' || { echo "BENCH=$(BENCH): give its folder, DATA=..."; exit 2; }
	$(PY) -m eval.run --benchmark "$(BENCH)" $(SAMPLING)$(call flag,run,$(RUN)) \
	  --out "$(or $(OUT),$(or $(RUN),runs)/benchmarks$(if $(filter all,$(BENCH)),,/$(BENCH)))"$(PROCESSES)$(MORE)
else
	$(PY) -m eval.heldout $(if $(RUN),$(OF_RUN),$(SAMPLING))$(call flag,out,$(OUT))$(PROCESSES)$(MORE)
endif

synth: $(READY) $(MODEL_READY)  ## the model writes questions of its own to the pictures of DATA
	$(PY) synthesize.py $(SAMPLING) --out "$(or $(OUT),runs/questions)"$(PROCESSES)$(MORE)

ablate: $(READY) $(if $(findstring --rollouts,$(ARGS)),,$(MODEL_READY))  ## compare REWARDS="majority frequency ..." over SEEDS=3, or on shards (ARGS="--rollouts DIR")
	$(PY) ablate.py --data "$(DATA)"$(call flag,model,$(MODEL))$(call flag,rewards,$(REWARDS))$(call flag,advantage,$(ADVANTAGE))$(call flag,steps,$(STEPS))$(call flag,seeds,$(SEEDS)) \
	  --out "$(or $(OUT),runs/ablate)"$(PROCESSES)$(MORE)

export: $(READY)  ## the model of RUN=runs/train merged, with a model card, to serve (ARGS=--adapter-only)
	$(PY) export.py --run "$(or $(RUN),runs/train)" --out "$(or $(OUT),exports/model)"$(MORE)

report: $(READY)  ## a page on RUN=runs/train for the browser: curves, groups, what changed (RUN="runs/a runs/b": side by side)
	$(PY) report.py $(or $(RUN),runs/train)$(call flag,out,$(OUT))$(MORE)

runs: $(READY)  ## a line for each run in runs/ (ARGS="--sort mean")
	$(PY) -m eval.runs$(MORE)

ask: $(READY)  ## what RUN=runs/train, or MODEL, answers: IMAGE=x.png QUESTION="How many ...?"; without a question, a console
	$(PY) ask.py $(if $(MODEL),--model "$(MODEL)",--run "$(or $(RUN),runs/train)")$(call flag,image,$(IMAGE))$(if $(QUESTION), "$(QUESTION)")$(MORE)

check-data: $(READY)  ## what DATA holds: rows, pictures, gold, what cannot be used; five examples as a page
	$(PY) check_data.py --data "$(DATA)"$(call flag,seed,$(SEED))$(call flag,out,$(OUT))$(MORE)

results: $(READY)  ## all that docs/results.md and README show, again: hours (ARGS="--only rewards,long" for some)
	$(PY) -m bench.studies$(MORE)

test: $(READY)  ## the tests; ARGS="-m slow" for those that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal$(MORE)

test-trl: $(READY)  ## our rewards in TRL, and the example; installs TRL
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep ^trl requirements-bench.txt)"
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_trl.py$(MORE)

test-extras: $(READY)  ## the page on a run in headless Chromium, which has to be there, trackers, notebooks; installs what they take
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-extras.txt
	EXTRAS=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_report.py tests/test_report_browser.py tests/test_tracking.py tests/test_notebooks.py$(MORE)

lint: $(READY)  ## ruff, check and format
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)

bench: $(READY) $(TINY)/warmup.json  ## the kernels beside naive PyTorch, our loop beside TRL's, judging beside separate calls
	$(PY) -m bench.kernels
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(PY) -m bench.loop$(MORE)
	$(PY) -m bench.judging

bench-gpu: $(READY)  ## all that needs an NVIDIA GPU: its tests; decoding, a step and the update at full size; the kernels beside their peers
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	PYTHON=$(PY) bash bench/gpu.sh

clean:  ## remove the virtual environment, the embedded model and caches; runs stay
	rm -rf $(VENV) $(TINY) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
