"""`penumbra rank`: what a person should look at first, and a choice of few in which no two are the same picture."""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from penumbra.__main__ import main
from penumbra.export.bundle import export_network
from penumbra.models.card import Novelty
from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.files.rank import Ranked, Ranker, look_of, rank_images, spread
from tests.conftest import FIXED, GAIN, picture, toy_card
from tests.serving.server import ROOT

CAMVID = ROOT.parent / "shared" / "camvid" / "val" / "images"
DULL, CLEAR = 100, 250


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["rank", *map(str, arguments)])


def listed(result: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(result.stdout)))


def paint(path: Path, red: int) -> float:
    """Write a picture of one colour; returns 1 - the confidence of the pointwise toy in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[..., 0] = red
    Image.fromarray(pixels).save(path)
    odds = np.exp(GAIN * np.array([red, 0, 0]) / 255)
    return float(1 - odds.max() / odds.sum())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, red in {"a.png": CLEAR, "deep/b.png": DULL, "c.png": 180}.items():
        paint(tmp_path / "in" / name, red)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


def test_the_expected_error_is_the_mean_of_one_less_the_confidence_and_the_highest_is_first(
    toy_store: Path, images: Path, tmp_path: Path
) -> None:
    result = run(images, "-m", "toy-pointwise", "--store", toy_store)
    assert result.exit_code == 0, result.output
    rows = listed(result)
    assert [row["image"] for row in rows] == [str(images / name) for name in ("deep/b.png", "c.png", "a.png")]
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    expected = [paint(tmp_path / "again.png", red) for red in (DULL, 180, CLEAR)]
    assert [float(row["expected_error"]) for row in rows] == pytest.approx(expected, abs=1e-5)
    assert {row["mutual_information"] for row in rows} == {""}  # one pass has none
    as_json = json.loads(run(images, "-m", "toy-pointwise", "--store", toy_store, "--json").stdout)
    assert [row["image"] for row in as_json] == [row["image"] for row in rows]
    assert as_json[0]["mutual_information"] is None
    assert "notes.txt" in result.stderr


def test_two_members_that_disagree_most_are_first_by_mutual_information(toy_store: Path, images: Path) -> None:
    result = run(images, "-m", "toy-opposed", "--store", toy_store, "--by", "mutual_information")
    assert [Path(row["image"]).name for row in listed(result)] == ["a.png", "c.png", "b.png"]
    assert 0.3 < float(listed(result)[0]["mutual_information"]) < np.log(3)


def test_what_is_stranger_than_the_reference_is_first_by_novelty(images: Path, tmp_path: Path) -> None:
    card, network = toy_card("latent")
    reference = Novelty("entropy", (0.1, 0.4, 1.0), num_pictures=3, num_samples=4, data="three")
    export_network(network, dataclasses.replace(card, novelty=reference), tmp_path / "store")
    result = run(images, "--store", tmp_path / "store", "--by", "novelty")
    assert result.exit_code == 0, result.output
    novelty = [float(row["novelty"]) for row in listed(result)]
    assert (
        Path(listed(result)[0]["image"]).name == "b.png" and novelty == sorted(novelty, reverse=True) and novelty[0] > 0
    )
    with Segmenter.open(tmp_path / "store", threads=1, tuning=FIXED) as segmenter:
        for option in ({"samples": 5}, {"views": "flip"}, {"overlap": 0.5}):
            ((name, value),) = option.items()
            with pytest.raises(
                BadOption, match=f"{name} is {value}.* has a novelty of 4, none and 0.25: leave all three"
            ):
                Ranker(segmenter, SegmentOptions(**option), by="novelty", draws=False)
        Ranker(segmenter, SegmentOptions(samples=4, views="none", overlap=0.25), by="novelty", draws=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--by", "mutual_information"), "'mutual_information'"),
        (("--by", "novelty"), "toy-pointwise has no reference"),
        (("--by", "beauty"), "'beauty'"),
        (("--budget", "0"), "0"),
        (("--samples", "3"), "samples is 3"),
    ],
)
def test_what_a_model_cannot_say_is_refused_before_the_work(
    toy_store: Path, images: Path, options: tuple[str, ...], words: str
) -> None:
    result = run(images, "-m", "toy-pointwise", "--store", toy_store, *options)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output


def test_a_broken_picture_is_named_at_the_end_and_keeps_no_other_from_its_rank(toy_store: Path, images: Path) -> None:
    (images / "bad.png").write_bytes((images / "a.png").read_bytes()[:60])
    result = run(images, "-m", "toy-pointwise", "--store", toy_store)
    assert result.exit_code == 1 and len(listed(result)) == 3
    assert "bad.png" in result.stderr and "Traceback" not in result.stderr


def test_a_page_shows_what_was_ranked_and_takes_the_place_of_a_page_alone(
    toy_store: Path, images: Path, tmp_path: Path
) -> None:
    (images / "a.png").rename(images / "<b>.png")
    page = tmp_path / "new" / "sheet.html"
    arguments = (images, "-m", "toy-opposed", "--store", toy_store, "--sheet", page)
    for _ in range(2):
        assert run(*arguments).exit_code == 0
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 2 * 3 and "&lt;b&gt;.png" in text and "<b>" not in text
    (images / "<b>.png").rename(images / "stra\udcdfe.png")
    result = run(*arguments, "--json")
    assert result.exit_code == 0 and "stra\\udcdfe.png" in page.read_text()
    for other in ("sheet.labels.png", "sheet"):
        result = run(*arguments[:-1], tmp_path / other)
        assert result.exit_code == 2 and "a name that ends in .html is wanted" in result.stderr
    os.mkfifo(tmp_path / "pipe.html")
    assert "pipe.html is in the way" in run(*arguments[:-1], tmp_path / "pipe.html").stderr
    page.write_text("a letter")
    result = run(*arguments)
    assert result.exit_code == 2 and "in the way" in result.stderr and page.read_text() == "a letter"


def ranked(name: str, score: float | None, *look: float) -> Ranked:
    return Ranked(name, {"expected_error": score}, np.array(look, np.float32), ())


def chosen(*pictures: Ranked, budget: int) -> list[str]:
    return [one.image for one in spread(pictures, "expected_error", budget)]


def test_a_choice_begins_with_the_highest_and_goes_on_with_score_times_distance() -> None:
    pictures = (
        ranked("a", 0.5, 0.0),
        ranked("like a", 0.49, 0.01),
        ranked("far", 0.2, 1.0),
        ranked("sure", 0.01, 0.9),
    )
    assert chosen(*pictures, budget=2) == ["a", "far"]
    assert chosen(*pictures, budget=4) == ["a", "far", "like a", "sure"]


def test_of_two_copies_one_is_chosen_and_a_picture_without_a_score_is_the_last() -> None:
    pictures = (ranked("a", 0.5, 0.3), ranked("copy", 0.5, 0.3), ranked("b", 0.1, 0.5), ranked("void", None, 0.9))
    assert chosen(*pictures, budget=9) == ["a", "b", "void"]
    assert chosen(budget=3) == []


def test_what_two_pictures_look_like_differs_by_their_colours_and_classes(
    toy_store: Path, rng: np.random.Generator
) -> None:
    with Segmenter.open(toy_store, threads=1, tuning=FIXED) as segmenter:
        red, green = np.zeros((2, 16, 24, 3), np.uint8)
        red[..., 0] = green[..., 1] = 255
        asked = SegmentOptions("toy-pointwise")
        looks = [look_of(segmenter.segment(image, asked)) for image in (red, green, red, picture(rng, 1, 1))]
    assert np.abs(looks[0] - looks[1]).sum() == pytest.approx(2 / 3 + 1)  # two of three channels, all classes
    assert np.array_equal(looks[0], looks[2]) and np.isfinite(looks[3]).all()


@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid beside the repository")
def test_no_two_neighbours_of_a_film_are_chosen(toy_store: Path) -> None:
    names = [path.name for path in sorted(CAMVID.glob("*_080*.jpg"))]
    with Segmenter.open(toy_store, threads=1, tuning=FIXED) as segmenter:
        ranker = Ranker(segmenter, SegmentOptions("toy-opposed"), by="expected_error", draws=False)
        found, _ = rank_images(ranker, f"{CAMVID}/*_080*.jpg")
    highest, few = (
        np.diff(sorted(names.index(Path(one.image).name) for one in choice))
        for choice in (found[:8], spread(found, "expected_error", 8))
    )
    assert len(found) == 50 and len(few) == 7 and min(few) > 1
    assert min(highest) == 1  # the highest alone are of few scenes
