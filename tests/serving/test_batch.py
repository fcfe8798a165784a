"""`penumbra batch`: one answer per image, in folders or buckets, once, also when the run is killed."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from penumbra.__main__ import main
from penumbra.models.errors import BadOption
from penumbra.serving.batch import FORMATS, MANIFEST, ask, find_tasks, run_batch
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from tests.conftest import picture
from tests.serving.server import ROOT, until

NAMES = ("a.png", "b.jpg", "deep/c.tif", "deep/er/d.webp")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["batch", *map(str, arguments)])


@pytest.fixture
def images(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "in"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(rng, 40, 50)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def answers(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def test_a_folder_gives_one_answer_per_image_in_the_same_folders(toy_store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(images, out, "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"made": 4, "kept": 0, "failed": 0}
    made = answers(out)
    assert set(made) == {"a.png", "b.png", "deep/c.png", "deep/er/d.png"}
    with Segmenter.open(toy_store, threads=1) as segmenter:
        pixels = np.asarray(Image.open(images / "a.png"))
        wanted = segmenter.segment(pixels, SegmentOptions(model="toy-pointwise")).labels_HW
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made["a.png"]))), wanted)
    again = run(images, out, "-m", "toy-pointwise", "--store", toy_store)
    assert again.exit_code == 0 and "0 made, 4 kept" in again.stdout and answers(out) == made


def test_only_what_is_missing_is_made_again(toy_store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (images, out, "-m", "toy-latent", "-f", "npz", "--seed", 4, "--store", toy_store, "--json")
    run(*command)
    made = answers(out)
    (out / "deep/c.npz").unlink()
    assert json.loads(run(*command).stdout) == {"made": 1, "kept": 3, "failed": 0}
    assert answers(out) == made


def test_answers_to_another_question_are_not_mixed_in(toy_store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, "-m", "toy-latent", "--store", toy_store)
    for other in (("--seed", 1), ("-f", "npz"), ("--picture", "entropy")):
        result = run(images, out, "-m", "toy-latent", "--store", toy_store, *other)
        assert result.exit_code == 2 and "other options" in result.stderr


def test_a_bad_picture_is_named_and_keeps_no_other_from_its_answer(
    toy_store: Path, images: Path, tmp_path: Path
) -> None:
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:200])
    result = run(images, tmp_path / "out", "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout) == {"made": 4, "kept": 0, "failed": 1}
    assert "bad.png" in result.stderr and "truncated" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_written(toy_store: Path, images: Path, tmp_path: Path, kind: str) -> None:
    result = run(images / "a.png", tmp_path / "out", "-m", "toy-latent", "-f", kind, "--store", toy_store)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / f"a.{kind}").stat().st_size > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-f", "gif"), "'gif'"),
        (("--overlap", "x"), "overlap"),
        (("--picture", "variance"), "'variance'"),
        (("-m", "unheard"), "'unheard'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    toy_store: Path, images: Path, tmp_path: Path, options: tuple[str, str], words: str
) -> None:
    result = run(images, tmp_path / "out", "-m", "toy-latent", "--store", toy_store, *options)
    assert result.exit_code == 2 and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_pattern_a_file_and_nothing_are_told_apart(images: Path) -> None:
    assert [task.target for task in find_tasks(f"{images}/**/*.tif", "o", "png")] == ["o/deep/c.png"]
    assert [task.target for task in find_tasks(f"{images}/b.jpg", "o/", "json")] == ["o/b.json"]
    for nothing in (f"{images}/absent", f"{images}/*.gif", f"{images}/notes.txt"):
        with pytest.raises(BadOption, match="no images"):
            find_tasks(nothing, "o", "png")
    (images / "a.jpg").write_bytes(b"")
    with pytest.raises(BadOption, match=r"2 images would be answered in a\.png"):
        find_tasks(str(images), "o", "png")
    with pytest.raises(BadOption, match="cannot be reached"):
        find_tasks("unheard://bucket/images", "o", "png")


@pytest.fixture
def bucket(images: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for name in NAMES:
        files.pipe_file(f"/bucket/in/{name}", (images / name).read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_a_bucket_gives_the_same_answers_as_a_folder(
    toy_store: Path, images: Path, tmp_path: Path, bucket: str
) -> None:
    asked = ask(toy_store, "toy-latent", "npz", {"seed": "3"})
    for source, output in ((str(images), str(tmp_path / "out")), (f"{bucket}/in", f"{bucket}/out")):
        assert run_batch(asked, source, output, engine="local") == ({"made": 4, "kept": 0, "failed": 0}, [])
    files = fsspec.filesystem("memory")
    for name, data in answers(tmp_path / "out").items():
        assert files.cat_file(f"/bucket/out/{name}") == data
    assert run_batch(asked, f"{bucket}/in", f"{bucket}/out", engine="local")[0]["kept"] == 4


def test_a_killed_run_loses_nothing_and_repeats_nothing(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(60):
        Image.fromarray(picture(rng, 150, 150)).save(folder / f"{number:02}.png")
    command = [sys.executable, "-m", "penumbra", "batch", str(folder), str(out), "-m", "toy-latent", "-f", "npz"]
    command += ["--samples", "32", "--overlap", "0.5", "--store", str(toy_store), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: len(list(out.glob("*.npz"))) >= 5 or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert 5 <= len(before) < 60
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert json.loads(done.stdout) == {"made": 60 - len(before), "kept": len(before), "failed": 0}, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(after) == 60 and before.items() <= after.items()
    for path in out.glob("*.npz"):
        with np.load(path) as file:
            assert file["labels"].shape == (150, 150)
