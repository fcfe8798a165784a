# The two commands of the README are `make serve` and `make test`; both set the environment up first.
PORT ?= 3000
GRPC_PORT ?= 3001
STORE ?= store
BIN := .venv/bin

.PHONY: setup serve test check format bench clean

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt serving/engine/kernels.c
	python3 -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,training,onnx,openvino]'
	@touch $@

serve: setup
	$(BIN)/penumbra serve --port $(PORT) --grpc-port $(GRPC_PORT) --store $(STORE)

test: setup
	$(BIN)/pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  # the demo store must be there: run `make serve` once
	for name in sampling methods moments memory overhead identity; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv store runs out build *.egg-info
