# make demo   create the environment and read the example image with the shipped model
# make demo-delvm   segment, draw edges and remove rain in new scenes with the shipped DeLVM
# make demo-web   answer questions in a web page with the shipped TinyLLaVA-nano and Vary-nano
# make serve-load   put load on the server of the shipped model and print its speed
# make eval-demo   score the shipped models on drawn scenes and lines of text
# make test   create the environment and run the test suite; CONTRIBUTING.md has the other targets

PYTHON ?= $(shell for v in 3.11 3.10 3.12; do python$$v -c 'import ensurepip' 2>&- && command -v python$$v && break; done || echo python3)
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SEED ?= 7

.PHONY: demo demo-delvm demo-web eval-demo serve-load test test-ci test-ports test-slow lint format nano-eval nano-train clean

demo: $(VENV)/installed
	$(BIN)/mindvlm-predict --image_dir examples/images/page.png

# The shipped DeLVM labels scenes of a seed that it has never seen: make demo-delvm SEED=123
SCENES = outputs/delvm_scenes/seed_$(SEED)
demo-delvm: $(VENV)/installed
	$(BIN)/mindvlm-make-data delvm-scenes --output $(SCENES)/pairs --num_images 19 --size 32 --seed $(SEED) --tasks segmentation edges rain
	$(BIN)/mindvlm-evaluate --benchmark delvm-pictures --config_path configs/delvm/scenes.yaml --data $(SCENES)/pairs \
		--tasks segmentation edges rain --output $(SCENES) --grid 2
	@echo "picture: $(SCENES)/grid.png"

# Ends with Ctrl-C: make demo-web PORT=8000
demo-web: PORT = 8000
demo-web: $(VENV)/installed-serve
	$(BIN)/mindvlm-serve --config_path configs/tinyllava/tinyllava_nano.yaml configs/vary/vary_nano.yaml --port $(PORT)

# Starts the server of Vary-nano, asks with 1 to 32 clients, and ends it: make serve-load PORT=8000
PORT ?= 8077
serve-load: $(VENV)/installed-test
	@$(BIN)/mindvlm-serve --port $(PORT) & server=$$!; trap "kill $$server" EXIT; \
		until curl -sf http://127.0.0.1:$(PORT)/health > /dev/null; do kill -0 $$server || exit 1; sleep 0.2; done; \
		$(BIN)/python tools/load_test.py --url http://127.0.0.1:$(PORT)/v1

# Draws small benchmarks in the layouts of public ones, and scores TinyLLaVA-nano and Vary-nano on them. --blind shows a gray
# picture instead, which measures guessing.
EVAL = outputs/eval_demo/seed_$(SEED)
DATA = $(BIN)/mindvlm-make-data benchmark --seed $(SEED) --output $(EVAL)/data
SCORE = $(BIN)/mindvlm-evaluate --data $(EVAL)/data
ANSWERER = --config_path configs/tinyllava/tinyllava_nano.yaml
eval-demo: $(VENV)/installed-plots
	$(DATA)/scenes --name scenes --num_images 320
	$(DATA)/pope --name pope --num_images 24
	$(DATA)/mme --name mme --num_images 60
	$(DATA)/page-ocr --name page-ocr --num_images 48
	$(SCORE)/scenes --benchmark scenes $(ANSWERER) --output $(EVAL)/scenes
	$(SCORE)/scenes --benchmark scenes $(ANSWERER) --output $(EVAL)/blind --blind
	$(SCORE)/pope --benchmark pope $(ANSWERER) --output $(EVAL)/pope
	$(SCORE)/mme --benchmark mme $(ANSWERER) --output $(EVAL)/mme
	$(SCORE)/page-ocr --benchmark page-ocr --config_path configs/vary/vary_nano.yaml --max_new_tokens 64 --output $(EVAL)/page-ocr
	$(BIN)/mindvlm-evaluate --compare $(addprefix $(EVAL)/,scenes blind pope mme page-ocr) --output $(EVAL)/figures.png

# Five rounds, because MindSpore keeps every compiled graph in memory and the suite compiles some thousands. Compiling uses
# one thread: two processes with one thread each are twice as fast as one process with two threads.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4194304 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
FILES = tests/checkpoint tests/weights tests/convert tests/ascend
CELLS = tests/nn tests/generation tests/processing
MODELS = tests/models tests/parallel
TRAINING = tests/training tests/datagen

test: $(VENV)/installed-test lint
	$(PYTEST) $(FILES)
	$(PYTEST) $(CELLS)
	$(PYTEST) $(MODELS)
	$(PYTEST) $(TRAINING)
	$(PYTEST) tests $(addprefix --ignore=,$(FILES) $(CELLS) $(MODELS) $(TRAINING))

# The rest of what CI checks: the other mode of each recorded case, more graphs and jobs, larger files
test-ci: $(VENV)/installed-test
	$(PYTEST) -rs -m ci tests

# Of these, the kernels on other processors and of other compilers; skipped tests say what is not installed
test-ports: $(VENV)/installed-test
	$(PYTEST) -rs -m ci tests/native/test_ports.py

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Measures the shipped Vary-nano on newly rendered images: make nano-eval SEED=123
nano-eval: $(VENV)/installed
	$(BIN)/python tools/evaluate_text.py --seed $(SEED) --num_images 1000

nano-train: $(VENV)/installed
	$(BIN)/mindvlm-train --config_path configs/vary/train_nano.yaml

$(VENV)/python: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
		|| { echo "MindSpore 2.10 needs Python 3.10 to 3.12; call: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt mindvlm/native/build.py $(wildcard mindvlm/native/src/*)
	$(PIP) -e '.[documents]'
	@touch $@

$(VENV)/installed-serve: $(VENV)/installed
	$(PIP) -e '.[serve,documents]'
	@touch $@

$(VENV)/installed-plots: $(VENV)/installed
	$(PIP) -e '.[plots]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rank_0
