"""`penumbra predict --engine ray`: one raster in parts, on nodes of which one is lost in the middle."""

import dataclasses
import os
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin

from penumbra.models.card import WindowSpec
from penumbra.models.errors import BadImage, ModelFault
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import find_artifact
from penumbra.serving.engine.windows import cover
from penumbra.serving.files import cluster
from penumbra.serving.files.cluster import Work, answer_part, connect, in_turn, on_ray, parts_of
from penumbra.serving.files.predict import IN_MEMORY, predict_file
from tests.conftest import FIXED, picture
from tests.serving.files.conftest import add_node

OPTIONS = SegmentOptions(model="toy-latent", samples=8, seed=5, overlap=0.5)
ray_is_there = pytest.mark.skipif(not find_spec("ray"), reason="the extra ray is not installed")


@pytest.fixture
def segmenter(toy_store: Path) -> Iterator[Segmenter]:
    with Segmenter(limits=IN_MEMORY, threads=1, tuning=FIXED) as opened:
        opened.load(find_artifact(toy_store, "toy-latent"))
        yield opened


def scene(path: Path, height: int, width: int) -> Path:
    pixels = picture(np.random.default_rng(1), height, width).transpose(2, 0, 1)
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, crs="EPSG:32632", transform=from_origin(5e5, 5e6, 2, 2)) as target:
        target.write(pixels)
    return path


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("height", [20, 32, 33, 300, 1000])
@pytest.mark.parametrize("answer", [None, (40, 60), (2000, 100)])
def test_parts_hold_every_row_once_and_begin_where_bands_do(
    overlap: float, height: int, answer: tuple[int, int] | None
) -> None:
    windows = dataclasses.replace(cover(height, 48, WindowSpec(32, 48), overlap), answer=answer)
    for num_parts in (1, 3, 100):
        parts = list(parts_of(windows, 0, num_parts=num_parts))
        assert [y for part in parts for y in range(*part)] == [*range(windows.size[0])]
        for y, _ in parts:
            assert windows.rows_above(windows.band_of(y)) == y
        later = list(parts_of(windows, parts[-1][0], num_parts=num_parts))
        assert later[0][0] == parts[-1][0] and later[-1][1] == windows.size[0]


@pytest.mark.parametrize("scale", [None, 0.5])
def test_bands_of_parts_are_those_of_the_whole(
    segmenter: Segmenter, toy_store: Path, tmp_path: Path, scale: float | None
) -> None:
    path, options = scene(tmp_path / "scene.tif", 600, 70), dataclasses.replace(OPTIONS, scale=scale)
    with rasterio.open(path) as dataset:
        whole = segmenter.segment(np.ascontiguousarray(dataset.read().transpose(1, 2, 0)), options)
    work = Work(find_artifact(toy_store, "toy-latent"), path, options, FIXED)
    windows = segmenter.plan(600, 70, options).windows
    parts = list(parts_of(windows, 0, num_parts=100))
    assert len(parts) > 2
    for y, end in parts:
        bands = [band for band, *_ in answer_part(work, y, end)]
        assert bands[0].y0 == y and bands[-1].y0 + len(bands[-1].labels) == end
        assert np.array_equal(np.concatenate([band.labels for band in bands]), whole.labels_HW[y:end])
        for name, values in whole.maps.items():
            assert np.array_equal(np.concatenate([band.maps[name] for band in bands]), values[y:end])


def test_a_process_that_takes_parts_of_many_rasters_keeps_one_engine(toy_store: Path, tmp_path: Path) -> None:
    running = []
    for name in ("a.tif", "b.tif", "c.tif"):
        work = Work(find_artifact(toy_store, "toy-latent"), scene(tmp_path / name, 40, 50), OPTIONS, FIXED)
        assert [*answer_part(work, 0, 40)]
        running.append(threading.active_count())
    assert running[2] <= running[0]


@ray_is_there
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own
class TestCluster:
    def test_a_lost_node_and_a_stopped_command_change_no_byte(
        self, segmenter: Segmenter, toy_store: Path, tmp_path: Path, cluster: Any
    ) -> None:
        path = scene(tmp_path / "scene.tif", 4000, 500)
        here = predict_file(segmenter, path, OPTIONS, tmp_path / "here")
        second = add_node(cluster, num_cpus=1)
        spread, out = on_ray(find_artifact(toy_store, "toy-latent")), tmp_path / "out"
        told: list[tuple[int, int]] = []

        def stop_at_a_third(num_done: int, num_windows: int) -> None:
            told.append((num_done, num_windows))
            if num_done > num_windows / 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            predict_file(segmenter, path, OPTIONS, out, spread=spread, progress=stop_at_a_third)
        assert not list(out.glob("*.tif")) and (out / "scene.partial").is_dir()
        again: list[tuple[int, int]] = []
        losing: list[threading.Thread] = []

        def lose_a_node_at_half(num_done: int, num_windows: int) -> None:
            again.append((num_done, num_windows))
            if num_done > num_windows / 2 and not losing:
                losing.append(threading.Thread(target=cluster.remove_node, args=(second, False)))
                losing[0].start()

        there = predict_file(segmenter, path, OPTIONS, out, spread=spread, progress=lose_a_node_at_half)
        losing[0].join(60)
        assert again[0][0] > 0.2 * again[0][1], "what was done before the stop was done again"
        assert told[-1][1] == again[-1][1] == again[-1][0]
        assert {file.name for file in out.iterdir()} == {"scene_labels.tif", "scene_maps.tif", "scene_item.json"}
        for name in ("labels", "maps"):
            assert Path(there.files[name]).read_bytes() == Path(here.files[name]).read_bytes(), name
        assert there.prediction.scores == here.prediction.scores and there.classes == here.classes
        assert there.prediction.warnings == here.prediction.warnings

    def test_work_that_ends_every_process_that_takes_it_comes_to_an_end(
        self, cluster: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("penumbra.serving.files.cluster.RETRIES", 1)
        with pytest.raises(ModelFault, match="the cluster lost each process that took a part of the work: "):
            [*in_turn(connect(), lambda code: os._exit(code), iter([(1,), (2,)]))]


@ray_is_there
def test_what_is_no_raster_is_refused_before_a_cluster_is_asked_for(
    segmenter: Segmenter, toy_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("a cluster was asked for"))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    spread = cluster.on_ray(find_artifact(toy_store, "toy-latent"))
    with pytest.raises(BadImage, match="it is no TIFF"):
        predict_file(segmenter, tmp_path / "a.png", OPTIONS, tmp_path / "out", spread=spread)
