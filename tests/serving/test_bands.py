"""Pictures of any bands and type: what fits is answered as numpy and torch by hand do, and what does not says so."""

import asyncio
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from penumbra.export.bundle import export_network
from penumbra.models.card import InputSpec
from penumbra.models.errors import BadImage, BadOption, TooLarge
from penumbra.serving.engine.decode import check_array, open_image, read_header
from penumbra.serving.engine.layout import Reading
from penumbra.serving.engine.options import Limits
from penumbra.serving.engine.raster import Raster
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.keys import Keys
from penumbra.serving.oip.grpc import Calls, service_handlers
from penumbra.serving.oip.grpc_server import GrpcServer
from penumbra.serving.oip.protocol import Inference
from penumbra.serving.room import Bodies
from penumbra.serving.telemetry import Telemetry
from tests.conftest import FIXED, GAIN, toy_card
from tests.serving.engine.tiffs import pillows, tiff
from tests.serving.in_process import in_process
from tests.serving.server import free_port

BANDS = ("blue", "green", "red", "nir", "swir1", "swir2")
SIX = InputSpec(
    (0.4,) * 6, (0.5, 0.5, 0.5, 0.5, 0.25, 0.5), bands=BANDS, dtype="uint16", low=(0, 0, 0, 0, 500, 0),
    high=(4000,) * 4 + (4500, 3000), clip=True,
)  # fmt: skip
GREY = InputSpec((0.5,), (0.25,), bands=("grey",))
RGBN = InputSpec((0.5,) * 4, (0.25,) * 4, bands=("red", "green", "blue", "nir"))
HEIGHTS = InputSpec((100.0,), (50.0,), 1.0, bands=("height",), dtype="float32")
BGRN16 = InputSpec((0.2,) * 4, (0.1,) * 4, 10_000.0, bands=("blue", "green", "red", "nir"), dtype="uint16")
DEEP = replace(GREY, dtype="uint16", scale=65535.0)
DEEP_RGB = InputSpec(dtype="uint16", scale=65535.0)
WIDE = Limits()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    for name, spec in (("six", SIX), ("grey", GREY)):
        card, network = toy_card("pointwise", name=name, spec=spec)
        export_network(network, card, store)
    return store


@pytest.fixture(scope="module")
def client(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with in_process(store, tmp_path_factory.mktemp("surface"), deterministic=True, predrain_s=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A scene of 75 x 130 px in six bands, of which some values lie beyond their range."""
    return np.random.Generator(np.random.PCG64(6)).integers(0, 5000, (75, 130, 6), dtype=np.uint16)


def by_hand(values_HWC: np.ndarray, spec: InputSpec) -> dict[str, np.ndarray]:
    shares = (values_HWC - np.array(spec.low)) / (np.array(spec.high) - spec.low)
    x_HWC = torch.from_numpy((shares.clip(0, 1) - spec.mean) / spec.std)
    prob_HWC = torch.softmax(GAIN * x_HWC, dim=2)
    entropy_HW = torch.special.entr(prob_HWC).sum(2)
    return {"prob": prob_HWC.numpy(), "confidence": prob_HWC.amax(2).numpy(), "entropy": entropy_HW.numpy()}


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def read(source: Any, spec: InputSpec, *chosen: str) -> Raster:
    if isinstance(source, np.ndarray):
        return check_array(source, WIDE, Reading(spec, chosen))
    return open_image(source, WIDE, Reading(spec, chosen)).load()


FORMS = {
    "tiff": (lambda scene: tiff(scene, names=" ".join(BANDS)), "image/tiff"),
    "tiff in another order": (lambda scene: tiff(scene[:, :, ::-1], names=" ".join(BANDS[::-1])), "image/tiff"),
    "int32": (lambda scene: tiff(scene.astype(np.int32), names=" ".join(BANDS)), "image/tiff"),
    "npz": (lambda scene: npz(image=scene, other=scene[:1]), "application/x-npz"),
    "npy": (lambda scene: npy(np.asfortranarray(scene.astype(">u2"))), "application/octet-stream"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_scene_of_six_bands_is_answered_as_by_hand(client: httpx.Client, scene: np.ndarray, form: str) -> None:
    make, media = FORMS[form]
    headers = {"Accept": "application/x-npz", "Content-Type": media}
    options = {"model": "six", "outputs": "confidence,entropy,probabilities"}
    answer = client.post("/segment", params=options, headers=headers, content=make(scene))
    assert answer.status_code == 200 and "x-penumbra-warning" not in answer.headers
    arrays, expected = np.load(io.BytesIO(answer.content)), by_hand(scene, SIX)
    np.testing.assert_allclose(arrays["probabilities"].transpose(1, 2, 0), expected["prob"], atol=1e-5)
    np.testing.assert_allclose(arrays["confidence"], expected["confidence"], atol=1e-5)
    np.testing.assert_allclose(arrays["entropy"], expected["entropy"], atol=1e-5)
    assert (arrays["labels"] == expected["prob"].argmax(2)).mean() > 0.999


def test_a_tensor_of_six_bands_is_answered_as_by_hand(client: httpx.Client, scene: np.ndarray) -> None:
    assert client.get("/v2/models/six").json()["inputs"][0] == {
        "name": "image", "datatype": "UINT16", "shape": [-1, -1, 6]
    }  # fmt: skip
    raw = scene.tobytes()
    tensor = {"name": "image", "datatype": "UINT16", "shape": scene.shape, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "entropy"}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post("/v2/models/six/infer", content=head + raw, headers=headers).json()
    entropy_HW = np.array(answer["outputs"][0]["data"]).reshape(75, 130)
    np.testing.assert_allclose(entropy_HW, by_hand(scene, SIX)["entropy"], atol=1e-5)
    tensor |= {"datatype": "UINT8"}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    refused = client.post("/v2/models/six/infer", content=head + raw, headers=headers)
    assert refused.status_code == 400 and "'UINT8'; UINT16 or BYTES is read" in refused.json()["error"]


def test_grpc_answers_tensors_of_six_bands_or_of_more_from_which_six_are_chosen(store: Path, scene: np.ndarray) -> None:
    def message(values_HWC: np.ndarray, **parameters: str) -> pb.ModelInferRequest:
        request = pb.ModelInferRequest(model_name="six")
        request.inputs.add(name="image", datatype="UINT16", shape=values_HWC.shape)
        request.outputs.add(name="entropy")
        request.raw_input_contents.append(values_HWC.tobytes())
        for name, text in parameters.items():
            request.parameters[name].string_param = text
        return request

    async def ask(segmenter: Segmenter) -> None:
        gateway, address = Gateway(segmenter, Telemetry(), limit_requests=1, timeout_s=60), f"127.0.0.1:{free_port()}"
        gateway.state = "ready"
        server = GrpcServer(address=address, message_bytes=2**20, keys=Keys(), telemetry=gateway.telemetry)
        await server.start()
        server.open(service_handlers(Calls(Inference(gateway), Bodies(2**30))))
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            more = np.dstack((scene[:, :, ::-1], scene[:, :, :1]))
            for request in (message(scene), message(more, bands="6,5,4,3,2,1")):
                (raw,) = (await stub.ModelInfer(request)).raw_output_contents
                entropy_HW = np.frombuffer(raw, np.float32).reshape(75, 130)
                np.testing.assert_allclose(entropy_HW, by_hand(scene, SIX)["entropy"], atol=1e-5)
            for request, said in (
                (message(more), "has the shape [75, 130, 7]; [-1, -1, 6] is read"),
                (message(more, bands="1,2,3,4,5,8"), "bands has '8'; the image has 7 bands: 1 (no name)"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.ModelInfer(request)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and said in refused.value.details()
        await server.stop(0)
        gateway.close()

    with Segmenter.open(store, device="cpu", threads=1, tuning=FIXED) as segmenter:
        asyncio.run(asyncio.wait_for(ask(segmenter), 60))


def test_every_form_of_answer_shows_a_scene_without_colours(client: httpx.Client, scene: np.ndarray) -> None:
    for media, options in (("image/png", {"picture": "overlay"}), ("image/tiff", {}), ("application/json", {})):
        answer = client.post(
            "/segment", params={"model": "six", **options}, headers={"Accept": media, "Content-Type": "image/tiff"},
            content=tiff(scene, names=" ".join(BANDS)),
        )  # fmt: skip
        assert answer.status_code == 200


def test_a_grey_network_reads_grey_and_the_brightness_of_colours(
    client: httpx.Client, rng: np.random.Generator
) -> None:
    grey = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    colours = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for data in (png(grey), png(np.stack([grey] * 3, 2)), tiff(grey), pillows(Image.fromarray(grey))):
        raster = read(data, GREY)
        assert (raster[:, :][:, :, 0] == grey).all() and raster.warnings == ()
    luminance = np.asarray(Image.fromarray(colours).convert("L"))
    for data in (png(colours), tiff(colours), tiff(colours[:, :, ::-1], colours="blue green red")):
        raster = read(data, GREY)
        assert np.abs(raster[:, :][:, :, 0].astype(int) - luminance).max() <= 1
        assert raster.warnings == ("the image is in colour, and is read as grey: its brightness by ITU-R 601",)
    deep = read(tiff(grey.astype(np.uint16) * 257), GREY)
    assert (deep[:, :][:, :, 0] == grey).all()
    answer = client.post("/segment", params={"model": "grey"}, headers={"Content-Type": "image/png"}, content=png(grey))
    assert answer.status_code == 200


def test_tagged_bands_are_taken_in_the_cards_order(rng: np.random.Generator) -> None:
    values = rng.integers(0, 9000, (20, 30, 4), dtype=np.uint16)
    tagged = read(tiff(values, colours="red green blue nir"), BGRN16)
    named = read(tiff(values, names="Red Green Blue NIR"), BGRN16)
    for raster in (tagged, named):
        assert (raster[:, :] == values[:, :, [2, 1, 0, 3]]).all() and raster.warnings == ()
    photo = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    blue_first = replace(InputSpec(), bands=("blue", "green", "red"))
    assert (read(png(photo), blue_first)[:, :] == photo[:, :, ::-1]).all()
    assert (read(png(photo), InputSpec(), "3", "Green", "red")[:, :] == photo[:, :, ::-1]).all()


def test_a_fourth_band_that_is_tagged_alpha_and_read_is_named(rng: np.random.Generator) -> None:
    values = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    raster = read(tiff(values, colours="red green blue alpha"), RGBN)
    assert (raster[:, :] == values).all() and raster.void(slice(None)) is None
    assert raster.warnings == ("the file does not name nir, read from band 4",)


def test_bands_are_chosen_by_number_or_name(rng: np.random.Generator) -> None:
    values = rng.integers(0, 9000, (20, 30, 7), dtype=np.uint16)
    for source in (tiff(values, names="a b c d e f g"), npz(image=values), npy(values), values):
        raster = read(source, BGRN16, "7", "2", "3", "1")
        assert (raster[:, :] == values[:, :, [6, 1, 2, 0]]).all() and raster.warnings == ()
    assert (read(tiff(values, names="a b c d e f g"), BGRN16, "g", "b", "C", "a")[:, :, ...].shape) == (20, 30, 4)
    for chosen, named in (
        (("1", "2"), "bands names 2; the model reads 4: blue, green, red, nir"),
        (("1", "2", "3", "8"), "bands has '8'; the image has 7 bands: 1 (a), 2 (b)"),
        (("1", "2", "3", "nir"), "bands has 'nir'; the image has 7 bands"),
    ):
        with pytest.raises(BadOption) as refusal:
            read(tiff(values, names="a b c d e f g"), BGRN16, *chosen)
        assert named in str(refusal.value)


VALUES = np.random.Generator(np.random.PCG64(3)).integers(0, 9000, (20, 30, 6), dtype=np.uint16)


@pytest.mark.parametrize(
    ("source", "spec", "named"),
    [
        (
            tiff(VALUES[:, :, :4]),
            SIX,
            "has 4 bands: 1 (grey), 2 (no name), 3 (no name), 4 (no name); the model reads blue, green",
        ),
        (tiff(VALUES, names="b1 b2 b3 b4 b5 b6"), SIX, "give their numbers in this order with the option bands"),
        (tiff(VALUES.astype(np.uint8)), SIX, "the TIFF image has uint8 values and the model reads uint16"),
        (tiff(VALUES.astype(np.float32)), SIX, "the TIFF image has float32 values and the model reads uint16"),
        (tiff(VALUES.astype(np.int16) - 5000, names=" ".join(BANDS)), SIX, "int16 values from -4"),
        (
            tiff(VALUES[:, :, 0], photometric="miniswhite"),
            DEEP,
            "white where values are least, and the model reads uint16 values of grey",
        ),
        (tiff(VALUES[:, :, :4], photometric="cmyk"), DEEP_RGB, "the TIFF image is of inks"),
        (tiff(VALUES[:, :, :1]), HEIGHTS, "the TIFF image has uint16 values and the model reads float32"),
        (png(VALUES[:, :, :3].astype(np.uint8)), SIX, "the image has uint8 values and the model reads uint16"),
        (
            png(VALUES[:, :, :3].astype(np.uint8)),
            RGBN,
            "has 3 bands: 1 (red), 2 (green), 3 (blue); the model reads red, green, blue, nir",
        ),
        (VALUES[:, :, :5], SIX, "the image is uint16 [20, 30, 5]; uint16 [height, width, 6] of blue, green, red, nir"),
        (VALUES.astype(np.int16), SIX, "the image is int16 [20, 30, 6]; uint16"),
        (npz(a=VALUES, b=VALUES), SIX, "the archive has 2 arrays and none is called image"),
        (npy(VALUES[0]), SIX, "the array is uint16 [30, 6]; numbers [height, width, bands] are wanted"),
        (
            npy(VALUES)[:-5],
            SIX,
            "the array is damaged or truncated (EOF: reading array data, expected 7200 bytes got 7195)",
        ),
        (npy(VALUES)[:40], SIX, "the array cannot be read"),
        (npz(image=VALUES)[:-9], SIX, "the array cannot be read"),
        (npy(np.array([[[{}]]])), SIX, "the array is object [1, 1, 1]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(source: Any, spec: InputSpec, named: str) -> None:
    with pytest.raises(BadImage) as refusal:
        read(source, spec)
    assert named in str(refusal.value)


def test_unnamed_bands_are_taken_in_the_cards_order_with_a_word() -> None:
    raster = read(tiff(VALUES), SIX)
    assert (raster[:, :] == VALUES).all()
    assert raster.warnings == (f"the file does not name {', '.join(BANDS)}, read from bands 1, 2, 3, 4, 5, 6",)
    more = read(tiff(np.dstack((VALUES, VALUES[:, :, :1])), names=f"{' '.join(BANDS)} quality"), SIX)
    assert more.warnings == (
        f"the image is read as {', '.join(BANDS)} from bands 1, 2, 3, 4, 5, 6; not used: band 7 (quality)",
    )


@pytest.mark.parametrize("spec", [BGRN16, SIX])
@pytest.mark.parametrize("bits", [-4, 0])
def test_values_of_another_bit_depth_are_told_of(spec: InputSpec, bits: int) -> None:
    """Those of 12 bits would be read as a black picture of 16, and the other way round as a white one."""
    values = VALUES[:, :, : spec.num_bands] % 5000 >> -bits
    for source in (values, tiff(values, names=" ".join(spec.bands))):
        said = read(source, spec).warnings
        assert bool(said) == (bits != 0) and all("it may be of another bit depth" in one for one in said)
    bright = read(np.full((20, 30, 1), 40_000, np.float32), HEIGHTS).warnings
    assert bright == (
        "most of the image's values are above 1100, and the model's are 100 on average: it may be of another bit depth "
        "or unit",
    )


def test_where_nothing_was_measured_the_network_sees_the_mean_and_the_answer_is_void() -> None:
    heights = np.full((20, 30, 1), 110, np.float32)
    heights[3, 4], heights[5, 6] = np.nan, -9999
    for source in (tiff(heights, nodata=-9999), np.where(heights == -9999, np.inf, heights)):
        raster = read(source, HEIGHTS)
        void_HW = raster.void(slice(None))
        assert void_HW is not None and void_HW.sum() == 2 and void_HW[3, 4] and void_HW[5, 6]
        assert raster[:, :][void_HW].tolist() == [[100], [100]] and (raster[:, :][~void_HW] == 110).all()


def test_a_bomb_of_an_array_is_refused_by_its_header() -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<u2", "fortran_order": False, "shape": (10**5, 10**5, 6)})  # type: ignore[no-untyped-call]
    with pytest.raises(Exception, match="the limit is 64,000,000"):
        read(head.getvalue(), SIX)
    wide = io.BytesIO()
    np.lib.format.write_array_header_1_0(wide, {"descr": "<u2", "fortran_order": False, "shape": (1000, 1000, 10**6)})  # type: ignore[no-untyped-call]
    with pytest.raises(Exception, match="the limit is 64,000,000"):
        read(wide.getvalue(), SIX)


def array_of(header: str) -> bytes:
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', ", "{[]: 1}", "{'descr': (), 'fortran_order': False, 'shape': ()}"]
)
def test_a_header_of_an_array_that_is_none_is_refused_in_a_sentence(header: str) -> None:
    with pytest.raises(BadImage, match="the array cannot be read"):
        read(array_of(header), SIX)


def repacked(source: bytes, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as kept, zipfile.ZipFile(file, "w", method) as archive:
        for name in kept.namelist():
            archive.writestr(name, kept.read(name))
    return file.getvalue()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (repacked(npz(image=VALUES), zipfile.ZIP_BZIP2), "packed by another method than numpy's own, deflate"),
        (repacked(npz(image=VALUES), zipfile.ZIP_LZMA), "packed by another method than numpy's own, deflate"),
        (b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little"), "header has 2,147,483,648 bytes; up to 65,536"),
        (npy(VALUES[:0]), r"the array is uint16 \[0, 30, 6\]"),
        (array_of(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**70}, 0, 6)}}"), "the array is uint16"),
    ],
)
def test_what_would_unpack_without_a_bound_or_to_nothing_is_refused(source: bytes, named: str) -> None:
    with pytest.raises(BadImage, match=named):
        read(source, SIX)
    assert (read(repacked(npz(image=VALUES), zipfile.ZIP_STORED), SIX)[:, :] == VALUES).all()


def test_an_array_is_held_whole_also_where_rasters_may_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penumbra.serving.engine.decode.PILLOW_PIXELS", 599)
    with (
        pytest.raises(TooLarge, match="the limit is 599"),
        read_header(npy(VALUES), Limits(pixels=2**40), Reading(SIX)),
    ):
        pass


def test_an_array_of_wide_values_is_refused_before_it_is_unpacked() -> None:
    data = io.BytesIO()
    np.save(data, np.zeros((1, 1, 3000), np.longdouble))
    with pytest.raises(TooLarge), read_header(data.getvalue(), Limits(pixels=1000)):
        pass


def test_a_png_of_16_bits_is_read_as_it_is() -> None:
    values = (VALUES[:, :, 0] * 7).astype(np.uint16)
    assert (read(png(values), DEEP)[:, :][:, :, 0] == values).all()
