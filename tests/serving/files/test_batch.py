"""`penumbra batch`: one answer per image, in folders or buckets, once, also when the run is killed."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from penumbra.__main__ import main
from penumbra.export.bundle import export_network
from penumbra.models.errors import BadOption
from penumbra.serving.engine.decode import open_image
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.batch import FORMATS, find_items, parse_batch, run_batch
from penumbra.serving.files.inputs import MANIFEST
from penumbra.serving.files.receipts import FOLDER, read_receipts
from tests.conftest import FIXED, picture, toy_card
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


def targets(source: str, extension: str) -> list[str]:
    return [task.target for task in find_items(source, "o", extension)[0]]


def photo(path: Path, rng: np.random.Generator) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(rng, 9, 9)).save(path)
    return path


def counted(result: Result) -> dict[str, int]:
    found: dict[str, int] = json.loads(result.stdout)
    return found


def answers(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and FOLDER not in path.parts
    }


def test_a_folder_gives_one_answer_per_image_in_the_same_folders(toy_store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(images, out, "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"made": 4, "kept": 0, "failed": 0, "skipped": 1}
    made = answers(out)
    assert set(made) == {"a.png", "b.png", "deep/c.png", "deep/er/d.png"}
    with Segmenter.open(toy_store, threads=1, tuning=FIXED) as segmenter:
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
    assert json.loads(run(*command).stdout) == {"made": 1, "kept": 3, "failed": 0, "skipped": 1}
    assert answers(out) == made


@pytest.mark.parametrize("name", ["out [v2]", "out*", "what?"])
def test_an_output_whose_name_looks_like_a_pattern_is_gone_on_with(
    toy_store: Path, images: Path, tmp_path: Path, name: str
) -> None:
    command = [images, tmp_path / name, "--store", toy_store, "-m", "toy-pointwise", "--json"]
    for counts in ({"made": 4, "kept": 0}, {"made": 0, "kept": 4}):
        assert counted(run(*command)).items() >= counts.items()


def test_an_empty_folder_of_receipts_holds_none(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    assert read_receipts(str(tmp_path)) == {}


def test_answers_to_another_question_are_not_mixed_in(toy_store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, "-m", "toy-latent", "--store", toy_store)
    for other in (("--seed", 1), ("-f", "npz"), ("--picture", "entropy")):
        result = run(images, out, "-m", "toy-latent", "--store", toy_store, *other)
        assert result.exit_code == 2 and "other options" in result.stderr
    card, network = toy_card("pointwise")
    export_network(network, dataclasses.replace(card, name="toy-latent"), tmp_path / "other")
    result = run(images, out, "-m", "toy-latent", "--store", tmp_path / "other")
    assert result.exit_code == 2 and "of another model" in result.stderr


def test_a_bad_picture_is_named_and_keeps_no_other_from_its_answer(
    toy_store: Path, images: Path, tmp_path: Path
) -> None:
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:200])
    result = run(images, tmp_path / "out", "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout) == {"made": 4, "kept": 0, "failed": 1, "skipped": 1}
    assert "bad.png" in result.stderr and "truncated" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["png", "npz", "json"])
def test_what_an_answer_warns_of_is_said_with_the_files_names(
    toy_store: Path, images: Path, tmp_path: Path, kind: str
) -> None:
    dim = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)  # 11 bits in 16
    for name in ("d1.png", "d2.png"):
        Image.fromarray(dim).save(images / name)
    result = run(images, tmp_path / "out", "-m", "toy-pointwise", "-f", kind, "--store", toy_store)
    assert result.exit_code == 0 and "6 made" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "warning of 2: " in line]
    assert "read as 0 (black) to 2047 (white)" in line and line.endswith(f"{images}/d1.png, {images}/d2.png")


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
    assert targets(f"{images}/**/*.tif", "png") == ["o/deep/c.png"]
    assert targets(f"{images}/b.jpg", "json") == ["o/b.json"]
    for nothing in (f"{images}/absent", f"{images}/*.gif", f"{images}/notes.txt"):
        with pytest.raises(BadOption, match="no images"):
            find_items(nothing, "o", "png")
    (images / "a.jpg").write_bytes(b"")
    with pytest.raises(BadOption, match=r"2 images would be answered in a\.png"):
        find_items(str(images), "o", "png")
    with pytest.raises(BadOption, match="cannot be reached"):
        find_items("unheard://bucket/images", "o", "png")


# -- files that are not the batch's own ----------------------------------------------------------


@pytest.mark.parametrize("output", ["in/out", "in", "in/../in/deep", "link", "link/out", "file://{}/in/out"])
def test_a_batch_into_its_own_input_answers_no_answer(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, output: str
) -> None:
    """Through every way to name the place, and by another question as well."""
    for name in ("a.jpg", "deep/b.jpg"):
        photo(tmp_path / "in" / name, rng)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    out = output.format(tmp_path) if "://" in output else tmp_path / output
    command = (tmp_path / "in", out, "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert counted(run(*command)) == {"made": 2, "kept": 0, "failed": 0, "skipped": 0}
    before = answers(tmp_path / "in")
    assert counted(run(*command)) == {"made": 0, "kept": 2, "failed": 0, "skipped": 2}
    other = run(tmp_path / "in", tmp_path / "in" / "other", *command[2:], "--picture", "entropy")
    assert counted(other) == {"made": 2, "kept": 0, "failed": 0, "skipped": 2}
    assert "a.png" in other.stderr and "answer of a batch" in other.stderr
    assert before.items() <= answers(tmp_path / "in").items()


def test_an_output_above_its_input_and_a_bucket_in_itself_answer_no_answer(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    photo(tmp_path / "in" / "in" / "a.jpg", rng)
    command = ("-m", "toy-pointwise", "--store", toy_store, "--json")
    for _ in range(2):
        assert counted(run(tmp_path / "in", tmp_path, *command))["failed"] == 0
    assert [path.name for path in tmp_path.rglob("*.png")] == ["a.png"]
    files = fsspec.filesystem("memory")
    files.pipe_file("/itself/a.jpg", (tmp_path / "in" / "in" / "a.jpg").read_bytes())
    for made in (1, 0):
        assert counted(run("memory://itself", "memory://itself/out", *command))["made"] == made
    files.rm("/itself", recursive=True)


def test_an_answer_in_the_place_of_an_image_is_refused(
    toy_store: Path, images: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    before = answers(images)
    (tmp_path / "link").symlink_to(images)
    for output in (images, images / "deep" / "..", tmp_path / "link", f"file://{images}"):
        result = run(images, output, "-m", "toy-pointwise", "--store", toy_store)
        assert result.exit_code == 2 and "take the place of the image" in result.stderr
    assert answers(images) == before and not (images / MANIFEST).exists()
    photo(tmp_path / "q" / "penumbra-batch.png", rng)
    result = run(tmp_path / "q", tmp_path / "out", "-m", "toy-pointwise", "-f", "json", "--store", toy_store)
    assert result.exit_code == 2 and "the batch's own" in result.stderr


@pytest.mark.parametrize("before", [True, False])
def test_a_file_that_somebody_put_in_an_answers_place_is_neither_done_nor_lost(
    toy_store: Path, images: Path, tmp_path: Path, before: bool
) -> None:
    out = tmp_path / "out"
    command = (images, out, "-m", "toy-pointwise", "--store", toy_store, "--json")
    if not before:
        run(*command)
    (out / "deep").mkdir(parents=True, exist_ok=True)
    (out / "a.png").write_bytes((images / "a.png").read_bytes())
    result = run(*command)
    assert result.exit_code == 1 and (out / "a.png").read_bytes() == (images / "a.png").read_bytes()
    wanted = {"made": 3, "kept": 0} if before else {"made": 0, "kept": 3}
    assert counted(result) == {**wanted, "failed": 1, "skipped": 1}
    assert "out/a.png is there and no answer of a batch" in result.stderr


def test_the_answer_to_another_image_of_that_name_is_not_taken_for_this_ones(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    command = ("-m", "toy-pointwise", "--store", toy_store, "--json")
    first, second = photo(tmp_path / "day1" / "a.jpg", rng), photo(tmp_path / "day2" / "a.jpg", rng)
    assert counted(run(first.parent, tmp_path / "out", *command))["made"] == 1
    made = answers(tmp_path / "out")
    result = run(second.parent, tmp_path / "out", *command)
    assert result.exit_code == 1 and "is there and the answer to another image" in result.stderr
    assert answers(tmp_path / "out") == made
    first.rename(tmp_path / "moved.jpg")
    first.parent.rmdir()
    (tmp_path / "day1").mkdir()
    (tmp_path / "moved.jpg").rename(first)
    assert counted(run(first.parent, tmp_path / "out", *command))["kept"] == 1, "the same bytes are the same image"


def test_an_answer_is_kept_for_as_long_as_its_image_has_the_same_bytes(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    command = (tmp_path / "in", tmp_path / "out", "-m", "toy-pointwise", "--store", toy_store, "--json")
    pixels, image = picture(rng, 200, 200), tmp_path / "in" / "a.tif"
    image.parent.mkdir()
    Image.fromarray(pixels).save(image)  # uncompressed
    assert counted(run(*command))["made"] == 1
    image.touch()
    assert counted(run(*command))["kept"] == 1
    pixels[0, 0] = 255 - pixels[0, 0]
    Image.fromarray(pixels).save(image)
    result = run(*command)
    assert counted(result)["failed"] == 1 and "the answer to another image, or to this one as it was" in result.stderr
    (receipts,) = (tmp_path / "out" / FOLDER).iterdir()
    name, (_, answer) = json.loads(receipts.read_text()).popitem()
    end = f"{image.stat().st_size}-{hashlib.sha256(image.read_bytes()[-65536:]).hexdigest()[:32]}"
    receipts.write_text(json.dumps({name: [end, answer]}))
    assert counted(run(*command))["kept"] == 1, "earlier versions looked at an image's end alone"


def test_one_odd_failure_is_that_images_alone(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of no known kind, as a codec or a broken plugin raises it."""
    for number in range(13):
        photo(tmp_path / "in" / f"{number:02}.png", rng)

    def opening(data: bytes, *rest: Any) -> object:
        if data == (tmp_path / "in" / "04.png").read_bytes():
            raise AssertionError("something\nodd")
        return open_image(data, *rest)

    monkeypatch.setattr("penumbra.serving.files.batch.open_image", opening)
    result = run(tmp_path / "in", tmp_path / "out", "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert result.exit_code == 1 and counted(result) == {"made": 12, "kept": 0, "failed": 1, "skipped": 0}
    (line,) = result.stderr.splitlines()
    assert "04.png: it failed unexpectedly (AssertionError: something)" in line


def test_what_stands_in_the_way_of_one_answer_is_that_images_alone(
    toy_store: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "a.png").mkdir(parents=True)
    (out / "b.png").symlink_to(tmp_path / "nowhere")
    (out / "deep").write_text("a file where a folder must be")
    result = run(images, out, "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert result.exit_code == 1 and counted(result) == {"made": 0, "kept": 0, "failed": 4, "skipped": 1}
    assert len(result.stderr.splitlines()) == 5 and ".part" not in result.stderr
    assert not (tmp_path / "nowhere").exists() and (out / "deep").is_file()


def test_signs_of_patterns_in_a_name_are_signs_of_a_name(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("photos [2024]/a.jpg", "photos [2024]/x/b*.jpg", "photos 2/c.jpg", "odd::name?/d.jpg"):
        photo(tmp_path / name, rng)
    assert targets(f"{tmp_path}/photos [2024]", "png") == ["o/a.png", "o/x/b*.png"]
    assert targets(f"{tmp_path}/photos [2024]/*.jpg", "png") == ["o/a.png"]
    assert targets(f"{tmp_path}/photos [2024]/**/*.jpg", "png") == ["o/a.png", "o/x/b*.png"]
    assert targets(f"{tmp_path}/photos [2024]/x/b*.jpg", "png") == ["o/b*.png"]
    assert targets(f"{tmp_path}/photos [0-9]/*", "png") == ["o/photos 2/c.png"]
    assert targets(f"{tmp_path}/odd::name?", "png") == ["o/d.png"]
    assert targets(f"file://{tmp_path}/photos [2024]", "png") == ["o/a.png", "o/x/b*.png"]


def test_what_is_skipped_is_counted_and_named_with_the_reason(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = tmp_path / "in"
    for name in ("a.jpg", "b.jfif", "c.mpo", "d.JPE"):
        photo(folder / "x.jpg", rng).rename(folder / name)
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs" / "a.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "e.jpg").symlink_to(folder / "a.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    result = run(folder, tmp_path / "out", "-m", "toy-pointwise", "--store", toy_store, "--json")
    assert counted(result) == {"made": 5, "kept": 0, "failed": 1, "skipped": 5}
    lines = {line.partition(": ")[2].partition(":")[0]: line for line in result.stderr.splitlines()}
    for reason, names in {
        "skipped 2, of which each is hidden": ("._a.jpg", ".thumbs/a.jpg"),
        "skipped 1, of which each is no image by its name": ("notes.txt",),
        "skipped 2, of which each is a folder, a link to one, or no file at all": ("pipe.jpg", "loop"),
        str(folder / "gone.jpg"): ("no such file",),
    }.items():
        assert all(name in lines[reason] for name in names)


def test_images_whose_answers_have_one_name_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """Also where only capitals tell them apart: many disks keep one file for both."""
    photo(tmp_path / "a.jpg", rng)
    photo(tmp_path / "A.png", rng)
    with pytest.raises(BadOption, match="2 images would be answered in"):
        find_items(str(tmp_path), "o", "json")


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
    asked = parse_batch(toy_store, "toy-latent", "npz", {"seed": "3"})
    for source, output in ((str(images), str(tmp_path / "out")), (f"{bucket}/in", f"{bucket}/out")):
        counts = run_batch(asked, source, output, engine="local")[0]
        assert (counts["made"], counts["failed"]) == (4, 0)
    files = fsspec.filesystem("memory")
    for name, data in answers(tmp_path / "out").items():
        assert files.cat_file(f"/bucket/out/{name}") == data
    assert run_batch(asked, f"{bucket}/in", f"{bucket}/out", engine="local")[0]["kept"] == 4


@pytest.mark.slow
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
    assert json.loads(done.stdout) == {"made": 60 - len(before), "kept": len(before), "failed": 0, "skipped": 0}, (
        done.stderr
    )
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(after) == 60 and before.items() <= after.items()
    for path in out.glob("*.npz"):
        with np.load(path) as file:
            assert file["labels"].shape == (150, 150)
