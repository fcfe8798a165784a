"""SHA-256 of what Penumbra answers and learns, asked from outside: what a rebuilt inside may not change.

    python -m tests.fingerprints --record FILE     writes {key: hash}
    python -m tests.fingerprints --against FILE    prints the keys that differ from a record, and exits 1 if any does

Every model is asked for every size in every form of every protocol. The server is in its deterministic mode. Floats
round differently from processor to processor, from torch to torch, and in compiled kernels, so a record names these.
"""

import hashlib
import io
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import grpc
import httpx
import numpy as np
import rasterio
import torch
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from penumbra.export.bundle import export_checkpoint, export_network
from penumbra.training.data import find_data
from penumbra.training.loop import Training
from penumbra.training.recipe import read_recipe
from tests.serving.server import ROOT, Server, serving
from tests.toys import toy_card

TOYS = ("pointwise", "latent", "dropout", "opposed", "boxed", "tagged", "bright", "nan")
ZOO = ("np_semiseg-camvid", "self_correcting-camvid")
TOY_SIZES = ((20, 30), (32, 48), (33, 49), (75, 64), (64, 141))
ZOO_SIZES = ((52, 71), (240, 320), (359, 481), (360, 480), (400, 500))
"""Height and width of pictures beside windows of 32 x 48 and 360 x 480: smaller, equal, odd, and several windows."""
PROMPTS = {
    "toy-boxed": {"boxes": "[[1, 2, 15, 18, 1], [5, 0, 20, 9, 2]]", "alpha": "2"},
    "toy-tagged": {"tags": "red,2"},
    "self_correcting-camvid": {"boxes": "[[3, 2, 40, 50, 1]]"},
    "toy-latent": {"samples": 3},
    "np_semiseg-camvid": {"samples": 3},
}
"""Options beside the seed, of the models that have more of them."""
SEGMENT = {
    "json": ("application/json", {"outputs": "default,margin"}),
    "png": ("image/png", {"picture": "overlay"}),
    "npz": ("application/x-npz", {"outputs": "default,margin,expected_entropy,probabilities"}),
    "geojson": ("application/geo+json", {"min_pixels": "2"}),
    "tiff": ("image/tiff", {"picture": "entropy"}),
}
"""Forms of `POST /segment`: media type and options."""
INFER: dict[str, tuple[str, dict[str, int]]] = {
    "raw": ("raw", {}),
    "values": ("values", {"labels": 0, "entropy": 0}),
    "file": ("file", {"labels": 0, "confidence": 0}),
    "classes": ("raw", {"labels": 0, "expected_entropy": 3}),
    "probabilities": ("file", {"probabilities": 0}),
}
"""Forms of inference: how the picture comes, and the outputs; a number above 0 asks for so many classes."""
VOLATILE_HEADERS = ("date", "server", "server-timing", "content-length", "x-request-id")
VOLATILE_FACTS = re.compile(rb'"timing_ms": ?{[^}]*}')
"""What is another in every answer; the length of a body changes with the digits of its timing."""
VOLATILE_INFO = ("version", "x-commit")
"""Facts of docs.json that change with a release."""
BOUNDS = [("grpc.max_receive_message_length", -1)]
EARLY = {"cpal_cam": {"summarise_every": 2, "least_rows": 2}} | {
    name: {"confidence": 0.15} for name in ("mc_dropout", "np_semiseg", "proto_seg")
}
"""Options of objectives with which untrained networks reach every part of the loss within five steps."""
STEPS = (0.05, 0.2, 0.35, 0.6, 0.9)
"""Progress at the steps of a training: in each of them another part of some method's schedule."""


def facts() -> dict[str, str]:
    """What the hashes of floats depend on."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    return {
        "processor": f"{processor} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "kernels": "compiled" if any((ROOT / "serving").rglob("_kernels*.so")) else "plain",
    }


def pictures(sizes: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, np.ndarray, bytes]]:
    """Name, pixels and file of a picture per size, each in another format, one with a white pixel."""
    rng = np.random.Generator(np.random.PCG64(15))
    for (height, width), form in zip(sizes, ("PNG", "JPEG", "WEBP", "TIFF", "BMP"), strict=True):
        blocks = rng.integers(0, 200, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
        image = blocks.repeat(9, 0).repeat(9, 1)[:height, :width] + rng.integers(0, 30, (height, width, 3), np.uint8)
        image[0, 0] = 255 if form == "PNG" else 0
        file = io.BytesIO()
        Image.fromarray(image).save(file, form, **({"lossless": True} if form == "WEBP" else {}))
        yield f"{height}x{width}", image, _on_the_ground(image) if form == "TIFF" else file.getvalue()


def _on_the_ground(image: np.ndarray) -> bytes:
    place = rasterio.transform.from_origin(500_000, 5_400_000, 2, 2)
    profile = {"height": image.shape[0], "width": image.shape[1], "count": 3, "dtype": "uint8"}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", crs="EPSG:32632", transform=place, **profile) as file:
            file.write(image.transpose(2, 0, 1))
        return bytes(memory.read())


def sha(*parts: object) -> str:
    data = [part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode() for part in parts]
    return hashlib.sha256(b"\0".join(data)).hexdigest()


def sha_of(answer: httpx.Response) -> str:
    headers = {name: value for name, value in answer.headers.items() if name not in VOLATILE_HEADERS}
    return sha(answer.status_code, headers, VOLATILE_FACTS.sub(b"", answer.content))


def ask_segment(client: httpx.Client, model: str, form: str, file: bytes) -> str:
    media, options = SEGMENT[form]
    fields = {"model": model, "seed": "7", **PROMPTS.get(model, {}), **options}
    body = {"data": fields, "files": {"image": file}} if form == "geojson" else {"params": fields, "content": file}
    headers = {"Accept": media} | ({} if form == "geojson" else {"Content-Type": "image/png"})
    answer = client.post("/segment", headers=headers, **body)
    return sha_of(answer)


def ask_rest(client: httpx.Client, model: str, form: str, image: np.ndarray, file: bytes) -> str:
    """Values as JSON are answered in JSON, all else in binary."""
    kind, outputs = INFER[form]
    raw = image.tobytes() if kind == "raw" else len(file).to_bytes(4, "little") + file
    tensor: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": image.shape}
    tensor |= {"data": image.tolist()} if kind == "values" else {"parameters": {"binary_data_size": len(raw)}}
    tensor |= {"datatype": "BYTES", "shape": [1]} if kind == "file" else {}
    wanted = [{"name": k, "parameters": {"classification": n} if n else {}} for k, n in outputs.items()]
    options = {"seed": 7, "binary_data_output": kind != "values", **PROMPTS.get(model, {})}
    head = json.dumps({"id": form, "parameters": options, "inputs": [tensor], "outputs": wanted}).encode()
    headers = {} if kind == "values" else {"Inference-Header-Content-Length": str(len(head))}
    body = head if kind == "values" else head + raw
    answer = client.post(f"/v2/models/{model}/infer", content=body, headers=headers)
    return sha_of(answer)


def ask_grpc(stub: Any, model: str, form: str, image: np.ndarray, file: bytes) -> str:
    """The form of classes comes as a stream of one."""
    kind, outputs = INFER[form]
    request = service_pb2.ModelInferRequest(model_name=model, id=form)
    tensor = request.inputs.add(name="image", datatype="UINT8", shape=image.shape)
    if kind == "values":
        tensor.contents.uint_contents.extend(image.ravel().tolist())
    elif kind == "raw":
        request.raw_input_contents.append(image.tobytes())
    else:
        tensor.CopyFrom(service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[1]))
        tensor.contents.bytes_contents.append(file)
    for name, value in {"seed": 7, **PROMPTS.get(model, {})}.items():
        setattr(request.parameters[name], "int64_param" if isinstance(value, int) else "string_param", value)
    for name, classes in outputs.items():
        output = request.outputs.add(name=name)
        if classes:
            output.parameters["classification"].int64_param = classes
    try:
        ask = stub.ModelInfer if form != "classes" else lambda *of, **how: next(stub.ModelStreamInfer(iter(of), **how))
        answer = ask(request, timeout=60)
    except grpc.RpcError as error:
        return sha(str(error.code()), error.details())
    return sha(answer.SerializeToString(deterministic=True))


def fill_store(store: Path) -> None:
    for form in TOYS:
        card, network = toy_card(form)
        export_network(network, card, store)
    for name in ZOO:
        export_checkpoint(ROOT / "models" / "zoo" / f"{name}.safetensors", store)


def answers(server: Server) -> Iterator[tuple[str, str]]:
    """Key and hash of every answer, and of the document of all paths."""
    with server.client() as client, grpc.insecure_channel(server.grpc_address, BOUNDS) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        client.headers["Accept-Encoding"] = "identity"
        document = client.get("/docs.json").json()
        document["info"] = {name: fact for name, fact in document["info"].items() if name not in VOLATILE_INFO}
        yield "docs.json", sha(document)
        for model in (*(f"toy-{form}" for form in TOYS), *ZOO):
            for size, image, file in pictures(TOY_SIZES if model.startswith("toy-") else ZOO_SIZES):
                for form in SEGMENT:
                    yield f"{model}/{size}/segment/{form}", ask_segment(client, model, form, file)
                for form in INFER:
                    yield f"{model}/{size}/rest/{form}", ask_rest(client, model, form, image, file)
                    yield f"{model}/{size}/grpc/{form}", ask_grpc(stub, model, form, image, file)


def losses(folder: Path) -> Iterator[tuple[str, str]]:
    """Key and hash of the named losses of five steps of every recipe, on small views of a few drawn frames."""
    rng = np.random.Generator(np.random.PCG64(16))
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(8):
            label = rng.integers(0, 12, (6, 8), dtype=np.uint8).repeat(24, 0).repeat(24, 1)
            image = (label[..., None] * (19, 7, 13) + rng.integers(0, 40, (*label.shape, 3))).astype(np.uint8)
            Image.fromarray(image).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(label).save(folder / split / "masks" / f"{i}.png")
    data = find_data("camvid")
    for path in sorted((ROOT / "training" / "recipes").glob("*-camvid.yaml")):
        recipe = read_recipe(path)
        if "lite2" in path.stem:
            continue  # what it begins with is in a package that may be missing, or a checkpoint that began so
        objective = recipe.objective | EARLY.get(path.stem.removesuffix("-camvid"), {})
        window = replace(recipe.window, height=96, width=128)
        recipe = replace(recipe, crop=(96, 128), window=window, objective=objective)
        training = Training(recipe, data.load(folder, "train"), len(data.classes))
        yield f"losses/{path.stem}", sha([training.advance(progress) for progress in STEPS])


def record(folder: Path) -> dict[str, str]:
    """All hashes by key. folder: for a store, a server and drawn frames."""
    torch.set_num_threads(1)
    fill_store(folder / "store")
    fixed = {"windows_per_batch": 2, "samples_per_call": 2, "lanes": 1}
    with serving(folder / "store", folder, deterministic=True, predrain_s=0, log_level="ERROR", **fixed) as server:
        hashes = dict(answers(server))
    return hashes | dict(losses(folder / "camvid"))


@click.command()
@click.option("--record", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write all hashes here.")
@click.option(
    "--against", "known", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compare with it."
)
def main(target: Path | None, known: Path | None) -> None:
    if bool(target) == bool(known):
        raise click.UsageError("one of --record and --against is needed")
    with tempfile.TemporaryDirectory() as folder:
        hashes = record(Path(folder))
    if target:
        target.write_text(json.dumps({"facts": facts(), "hashes": hashes}, indent=0) + "\n")
        return
    document = json.loads(known.read_text())
    if document["facts"] != facts():
        click.echo(f"recorded on {document['facts']}, and this is {facts()}: other floats may be right too", err=True)
    different = differences(hashes, document["hashes"])
    click.echo("\n".join([*different, f"{len(different)} of {len(hashes)} differ"]))
    sys.exit(bool(different))


def differences(hashes: dict[str, str], known: dict[str, str]) -> list[str]:
    """The keys whose hashes differ, or that only one of the two has."""
    return sorted(key for key in hashes | known if hashes.get(key) != known.get(key))


if __name__ == "__main__":
    main()
