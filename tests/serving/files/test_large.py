"""Images larger than memory should hold: the same bytes as small ones, in bounded memory, through a kill -9."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import from_origin

from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, WindowSpec
from penumbra.models.errors import BadImage, BadOption, DiskFull
from penumbra.serving.engine import canvas
from penumbra.serving.engine.layout import Place
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.raster import Raster, open_raster
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.files.cluster import Work, answer_part
from penumbra.serving.files.predict import predict_file
from penumbra.serving.spool import LONG, MARK, SCRATCH, RowFile, Spool, disk
from tests.conftest import picture, toy_card
from tests.serving.server import ROOT, until

PLACE = {"crs": "EPSG:32632", "transform": from_origin(400_000, 5_000_000, 10, 10)}
SIDE = 6000
ARRAYS_MB = SIDE * SIDE * (3 + 1 + 3 * 4) / 2**20
"""Of the picture, its labels and three maps, if they were held at once: 549 MB."""


@pytest.fixture(scope="module")
def segmenter(toy_store: Path) -> Any:
    with Segmenter.open(toy_store, threads=1, device="cpu", tuning=Tuning(samples_per_call=4)) as opened:
        yield opened


def tiff(path: Path, pixels_HWC: np.ndarray, **facts: Any) -> Path:
    height, width, count = pixels_HWC.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": pixels_HWC.dtype.name}
    with rasterio.open(path, "w", **(profile | PLACE | facts)) as target:
        target.write(pixels_HWC.transpose(2, 0, 1))
    return path


def opened(path: Path) -> Raster:
    raster = open_raster(path)
    assert raster is not None
    return raster


KINDS: list[dict[str, Any]] = [
    {},
    {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate", "predictor": 2},
    {"compress": "lzw", "blockysize": 7},
    {"bigtiff": "YES", "tiled": True, "blockxsize": 16, "blockysize": 16},
    {"interleave": "band", "compress": "zstd"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_a_raster_are_those_of_the_picture(tmp_path: Path, rng: np.random.Generator, kind: Any) -> None:
    pixels = picture(rng, 150, 211)
    raster = opened(tiff(tmp_path / "a.tif", pixels, **kind))
    assert raster.shape == pixels.shape
    for rows, columns in [(slice(0, 150), slice(0, 211)), (slice(7, 40), slice(100, 211)), (slice(149, 150), slice(3))]:
        assert np.array_equal(raster[rows, columns], pixels[rows, columns])
    assert np.array_equal(raster.load()[3:9, 5:7], pixels[3:9, 5:7])


def test_deep_grey_and_many_bands_become_three_channels_of_eight_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (20, 30, 5), dtype=np.uint16)
    assert np.array_equal(opened(tiff(tmp_path / "a.tif", deep))[:, :], deep[:, :, :3] >> 8)
    grey = rng.integers(0, 256, (20, 30, 1), dtype=np.uint8)
    assert np.array_equal(opened(tiff(tmp_path / "b.tif", grey))[:, :], grey.repeat(3, 2))


def test_a_raster_is_answered_as_its_pixels_are(segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = picture(rng, 170, 230)
    options = SegmentOptions(model="toy-latent", seed=5, samples=4)
    from_array = segmenter.segment(pixels, options)
    from_file = segmenter.segment(opened(tiff(tmp_path / "a.tif", pixels)), options)
    assert np.array_equal(from_array.labels_HW, from_file.labels_HW)
    for name, values in from_array.maps.items():
        assert np.array_equal(values, from_file.maps[name])


def test_pixels_without_a_measurement_have_no_label(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = picture(rng, 80, 90) + 1
    pixels[10:60, 20:30] = 0
    pixels[0, 0] = (0, 0, 7)  # one channel is zero by chance
    raster = opened(tiff(tmp_path / "a.tif", pixels, nodata=0))
    labels = segmenter.segment(raster, SegmentOptions(model="toy-pointwise")).labels_HW
    assert np.array_equal(labels == IGNORE, (pixels == 0).all(-1)) and labels[0, 0] == 2


# -- going on where it ended ---------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.7])
@pytest.mark.parametrize("size", [(200, 90), (31, 47), (33, 49)])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_from_any_row_on_the_bytes_are_those_of_one_run(
    segmenter: Segmenter, rng: np.random.Generator, overlap: float, size: tuple[int, int], scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(canvas, "PIECE_PIXELS", 500)
    image, options = picture(rng, *size), SegmentOptions(model="toy-latent", overlap=overlap, samples=3, scale=scale)
    whole = {band.y0: band for band in segmenter.bands(image, options)}
    for y in {0, 1, size[0] // 3, size[0] // 2, size[0] - 1}:
        rest = list(segmenter.bands_from(y, image, options, limits=LONG, cancelled=threading.Event()))
        sound = [band for band in rest if band.y0 + len(band.labels) > y]
        assert sound[0].y0 <= y and sound[-1].y0 == max(whole)
        for band in sound:
            assert np.array_equal(band.labels, whole[band.y0].labels)
            assert np.array_equal(band.maps["entropy"], whole[band.y0].maps["entropy"])


LINE = Place(CRS.from_epsg(4326), gcps=[GroundControlPoint(k, k, k, k) for k in range(2)])


def test_a_spool_of_another_question_is_begun_anew(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    image = Raster(picture(rng, 90, 60))
    for seed, source, place in ((1, "a", None), (2, "a", None), (2, "b", None), (2, "b", Place()), (2, "b", LINE)):
        options, image.place = SegmentOptions(model="toy-latent", seed=seed), place
        spool = Spool(tmp_path / "spool", segmenter, image, options, source=source)
        assert spool._labels.num_rows == 0
        found = spool.fill(limits=LONG, cancelled=threading.Event())
        wanted = segmenter.segment(image, options)
        assert np.array_equal(found.labels_HW[:], wanted.labels_HW)
        assert np.array_equal(found.maps["entropy"][:], wanted.maps["entropy"])


def test_a_spool_goes_on_beside_no_file_of_somebodys_and_removes_its_own_alone(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    image, place = Raster(picture(rng, 90, 60)), tmp_path / "spool"

    def spooled(seed: int) -> Spool:
        spool = Spool(place, segmenter, image, SegmentOptions(model="toy-latent", seed=seed), source="a")
        spool.fill(limits=LONG, cancelled=threading.Event())
        return spool

    place.mkdir()  # as a run leaves it that is killed at its very beginning
    spooled(1)
    (place / f"{SCRATCH}.rows").write_text("as a run leaves it that is killed while it writes the answer")
    spool = spooled(1)
    (place / "notes.txt").write_text("somebody's")
    for seed in (1, 2):
        with pytest.raises(BadOption, match=r"notes\.txt"):
            spooled(seed)
    spool.remove()
    assert (place / "notes.txt").exists()
    (place / "notes.txt").unlink()
    (place / MARK).write_text("")  # the disk was full
    spooled(1)
    spooled(2).remove()
    assert not place.exists()


def test_rows_are_written_and_read_by_slices(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.random((50, 7), dtype=np.float32)
    rows = RowFile(tmp_path / "rows", (50, 7), np.float32)
    assert rows.num_rows == 0
    for y in range(0, 50, 20):
        rows[y : y + 20] = values[y : y + 20]
    assert rows.num_rows == 50 and np.array_equal(rows[:], values) and np.array_equal(rows[13:29], values[13:29])


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Every write to this device fails for want of room."""
    (tmp_path / "rows").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="disk is full"), disk():
        RowFile(tmp_path / "rows", (5, 7), np.uint8)[0:5] = np.zeros((5, 7))


def test_a_file_that_cannot_be_written_for_another_reason_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskFull) as refusal, disk():
        RowFile(tmp_path / "absent" / "rows", (5, 7), np.uint8)[0:5] = np.zeros((5, 7))
    assert str(refusal.value).startswith("a file of the answer cannot be written (No such file or directory);")
    assert "room" not in str(refusal.value)


# -- penumbra predict ----------------------------------------------------------------------------


def test_a_raster_is_predicted_into_rasters_in_its_place(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    pixels = picture(rng, 600, 300)
    path = tiff(tmp_path / "a.tif", pixels)
    options = SegmentOptions(model="toy-latent", seed=3)
    outcome = predict_file(segmenter, path, options, tmp_path / "out")
    wanted = segmenter.segment(pixels, options)
    with rasterio.open(outcome.files["labels"]) as labels, rasterio.open(outcome.files["maps"]) as maps:
        for file in (labels, maps):
            assert file.crs.to_epsg() == 32632 and file.transform == PLACE["transform"] and file.profile["tiled"]
        assert np.array_equal(labels.read(1), wanted.labels_HW)
        assert maps.descriptions == tuple(wanted.maps)
        for band, values in enumerate(wanted.maps.values(), 1):
            assert np.array_equal(maps.read(band), values)
    assert sum(row["pixels"] for row in outcome.classes) == 600 * 300
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_labels.tif", "a_maps.tif", "a_item.json"}


def test_what_is_put_in_an_answers_place_while_it_is_made_stays(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, mine = tiff(tmp_path / "a.tif", picture(rng, 60, 90)), tmp_path / "out" / "a_labels.tif"
    options = SegmentOptions(model="toy-latent")
    with pytest.raises(BadOption, match=r"a_labels\.tif is in the way"):
        predict_file(
            segmenter, path, options, tmp_path / "out", progress=lambda done, of: mine.write_text("mine")
        )  # fmt: skip
    assert mine.read_text() == "mine"
    mine.unlink()
    assert predict_file(segmenter, path, options, tmp_path / "out").files["labels"] == str(mine)


def test_a_raster_that_breaks_off_is_refused_and_what_was_done_is_kept(
    segmenter: Segmenter, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tiff(tmp_path / "a.tif", picture(rng, 900, 200), compress="deflate", blockysize=50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BadImage, match="the TIFF image is damaged or truncated"):
        predict_file(segmenter, path, SegmentOptions(model="toy-latent"), tmp_path / "out")


def test_damage_in_rows_that_are_done_is_told_by_whoever_goes_on(
    segmenter: Segmenter, toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    facts = {"compress": "jpeg", "tiled": True, "blockxsize": 64, "blockysize": 64, "photometric": "ycbcr"}
    path = tiff(tmp_path / "a.tif", picture(rng, 400, 190), **facts)
    with rasterio.open(path) as dataset:
        at = int(dataset.get_tag_item("BLOCK_OFFSET_1_0", "TIFF", bidx=1))
        end = at + int(dataset.get_tag_item("BLOCK_SIZE_1_0", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[(at + end) // 2 : (at + end) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    whole = predict_file(segmenter, path, SegmentOptions(model="toy-latent"), tmp_path / "whole")
    (said,) = whole.prediction.warnings
    assert "is damaged, and its pixels there are a guess" in said

    def stop(num_done: int, num_windows: int) -> None:
        if num_done > num_windows / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_file(segmenter, path, SegmentOptions(model="toy-latent"), tmp_path / "out", progress=stop)
    rest = predict_file(segmenter, path, SegmentOptions(model="toy-latent"), tmp_path / "out")
    assert rest.prediction.warnings == (said,)
    work = Work(find_artifact(toy_store, "toy-latent"), path, SegmentOptions(model="toy-latent"), Tuning())
    found = set[str]().union(*(damage for _, _, damage in answer_part(work, 0, 400)))
    assert [what in said for what in found] == [True]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with a model of usual windows, and a picture of 6000 x 6000."""
    folder = tmp_path_factory.mktemp("large")
    card, network = toy_card("latent", name="wide", window=WindowSpec(512, 512))
    export_network(network, card, folder / "store")
    tile = picture(np.random.Generator(np.random.PCG64(3)), 500, SIDE)
    path = folder / "large.tif"
    profile = {"driver": "GTiff", "height": SIDE, "width": SIDE, "count": 3, "dtype": "uint8", "tiled": True}
    with rasterio.open(path, "w", **profile, blockxsize=512, blockysize=512, compress="deflate", **PLACE) as target:
        for y in range(0, SIDE, 500):
            window = rasterio.windows.Window(0, y, SIDE, 500)
            target.write(np.roll(tile, y, axis=1).transpose(2, 0, 1), window=window)
    return folder / "store", path


MEASURED = """
import re, sys
from pathlib import Path
from penumbra.__main__ import main
main(sys.argv[1:], standalone_mode=False)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024)
"""


def command(large: tuple[Path, Path], out: Path) -> list[str]:
    store, path = large
    arguments = ["predict", path, "-o", out, "--store", store, "--samples", "2", "--json"]
    return [sys.executable, "-c", MEASURED, *map(str, arguments)]


@pytest.mark.slow
def test_a_large_raster_takes_bounded_memory_and_outlives_a_kill(large: tuple[Path, Path], tmp_path: Path) -> None:
    """36 megapixels twice, at once and killed in the middle: the same pixels, and a peak below the arrays' size."""
    small, killed = tmp_path / "small", tmp_path / "killed"
    environment = os.environ | {"PENUMBRA_THREADS": "1"}
    done = subprocess.run(command(large, small), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    facts, peak_mb = done.stdout.splitlines()
    assert json.loads(facts)["size"] == [SIDE, SIDE]
    assert int(peak_mb) < 300 + 700, f"{peak_mb} MB"
    process = subprocess.Popen(command(large, killed), cwd=ROOT, env=environment, start_new_session=True)
    rows = RowFile(killed / "large.partial" / "labels", (SIDE, SIDE), np.uint8)
    try:
        until(lambda: rows.num_rows > SIDE // 3 or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert SIDE // 3 < rows.num_rows < SIDE
    mark = (rows[0:1] + 1) % 3
    rows[0:1] = mark  # what is kept is not run again, so the mark is in the answer
    done = subprocess.run(
        command(large, killed), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name in ("labels", "maps"):
        with rasterio.open(small / f"large_{name}.tif") as one, rasterio.open(killed / f"large_{name}.tif") as other:
            for band in one.indexes:
                values, resumed = one.read(band), other.read(band)
                assert np.allclose(values[1:], resumed[1:], atol=1e-5)
                assert np.array_equal(resumed[:1], mark) if name == "labels" else np.allclose(values[0], resumed[0])
    assert not (killed / "large.partial").exists()
