"""Tuning: the fastest that the gate passes becomes the next version, whatever ends the search."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from penumbra.__main__ import main
from penumbra.export.alarm import Overdue, until
from penumbra.export.bundle import export_checkpoint, verify_artifact
from penumbra.export.candidates import Row
from penumbra.export.load import Answers, Load, Speed, few, remeasure
from penumbra.export.report import print_parity, print_tuned
from penumbra.export.tune import Outcome, TuneOptions, tune_artifact
from penumbra.export.zoo import ZOO
from penumbra.models.card import Readout, Tuned, dump_card
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.errors import BadArtifact, BadOption, ParityFailed
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import CARD, artifact_card, open_artifact, sha256_of, write_version
from penumbra.serving.http.routes import summary
from tests.conftest import picture, toy_card

NAME = "toy-pointwise"
QUICK = (0.001, 0.002)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.safetensors"
    config = ToyConfig(gain=10.0)
    card = dataclasses.replace(toy_card("pointwise")[0], config=dataclasses.asdict(config))
    save_checkpoint(path, card, ToyNetwork(config))
    return path


@pytest.fixture
def store(tmp_path: Path, checkpoint: Path) -> Path:
    export_checkpoint(checkpoint, tmp_path / "store")
    return tmp_path / "store"


def tune(
    checkpoint: Path, store: Path, say: Callable[[str], object] = lambda line: None, minutes: float = 5.0,
    pictures: Sequence[Path] = (), load: Load = Load(), always: bool = True,  # noqa: B008 (frozen)
) -> Outcome:  # fmt: skip
    """Tune over torchscript alone, in the least time; by default the fastest is written whatever luck says."""
    ends = time.perf_counter() + 60 * minutes
    where = {"checkpoint": checkpoint, "backends": ["torchscript"], "device": "cpu", "seconds": QUICK}
    return tune_artifact(NAME, store, TuneOptions(ends, load, pictures, always=always, **where), say)


@dataclasses.dataclass(frozen=True, slots=True)
class Known(Load):
    """A load whose answers take as long as is said: as the model is served, and in sizes that are tried, where more
    windows a batch may make it faster."""

    as_it_is_s: float = 0.2
    gains_by_batches: bool = False

    def measure(self, segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, seconds: float) -> Answers:
        windows = segmenter.find(name).windows_per_batch if self.gains_by_batches else 1
        is_as_it_is = segmenter._tuning == Tuning()
        return {8: [(self.as_it_is_s if is_as_it_is else 0.2 / windows, 1)]}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Outcome:
    store = tmp_path_factory.mktemp("tuned")
    export_checkpoint(checkpoint, store)
    return tune(checkpoint, store)


def test_the_fastest_is_the_next_version_whose_sizes_the_engine_follows(tuned: Outcome) -> None:
    outcome, store = tuned, tuned.directory.parents[1]
    card = open_artifact(outcome.directory).card
    assert (outcome.directory, card.version, outcome.is_complete) == (store / NAME / "2", 2, True)
    names = ["as it is", "torchscript bf16", "torchscript fp32", "torchscript fp16"]
    assert [row.name for row in outcome.rows] == names and outcome.chosen in outcome.rows
    assert card.export and card.tuned == outcome.tuned and list(outcome.tuned.over) == names
    assert f"{card.export.backend} {card.export.precision}" == outcome.chosen.name
    assert outcome.tuned.gate == "drawn windows" and outcome.tuned.windows_per_s > 0
    assert not list((store / NAME).glob(".draft-*"))
    with Segmenter.open(store, device="cpu") as segmenter:
        runtime = segmenter.find(NAME)
        assert segmenter.is_tuned_here(card)
        assert (runtime.windows_per_batch, runtime.samples_per_call, runtime.lanes) == outcome.chosen.sizes
    with Segmenter.open(store, device="cpu", lanes=1) as segmenter:
        assert segmenter.find(NAME).lanes == 0, "lanes that are said are not the card's"


def near_ties(folder: Path) -> Path:
    """A picture whose brightest channel is brighter by less than eight bits of a logit can tell: both are 8.25."""
    image_HW3 = np.full((32, 48, 3), 210, np.uint8)
    image_HW3[..., 1] = 211
    path = folder / "ties.png"
    Image.fromarray(image_HW3).save(path)
    return path


def test_what_fails_the_gate_on_the_pictures_is_not_measured(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    outcome = tune(checkpoint, store, pictures=[near_ties(tmp_path)])
    assert "of labels flip" in outcome.refused["torchscript bf16"]
    assert outcome.tuned.gate == "1 picture" and "torchscript bf16" not in {row.name for row in outcome.rows}
    assert outcome.tuned.over["torchscript bf16"] == outcome.refused["torchscript bf16"]


def test_an_interruption_keeps_the_best_so_far(checkpoint: Path, store: Path) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("torchscript fp32"):
            raise KeyboardInterrupt

    outcome = tune(checkpoint, store, interrupt)
    assert not outcome.is_complete and outcome.chosen.name.startswith("torchscript")
    assert open_artifact(outcome.directory).card.tuned == outcome.tuned


def test_an_interruption_while_a_candidate_is_judged_leaves_it_out(checkpoint: Path, store: Path) -> None:
    judged = []

    def judge(_: Segmenter) -> dict[str, float]:
        judged.append(1)
        if len(judged) == 3:  # after that which is served and the first candidate
            raise KeyboardInterrupt
        return {"mIoU": 0.5}

    where = {"checkpoint": checkpoint, "backends": ["torchscript"], "device": "cpu", "seconds": QUICK, "always": True}
    options = TuneOptions(time.perf_counter() + 300, Load(), judge=judge, **where)
    outcome = tune_artifact(NAME, store, options, lambda line: None)
    assert len(outcome.rows) == 2 and outcome.front and not outcome.is_complete
    assert list(outcome.refused.values()) == ["was not tried, since the search was ended"] * 2


def test_a_version_that_was_calibrated_meanwhile_is_what_is_written_anew(checkpoint: Path, store: Path) -> None:
    def calibrate(line: str) -> None:
        if line.startswith("torchscript fp32"):
            artifact = open_artifact(store / NAME / "1")
            card = dataclasses.replace(artifact.card, version=2, readout=Readout(temperature=1.5))
            write_version(store / NAME / "1", store / NAME / "2", card)

    outcome = tune(checkpoint, store, calibrate)
    assert (outcome.directory.name, artifact_card(outcome.directory).readout.temperature) == ("3", 1.5)


def test_another_checkpoint_that_was_exported_meanwhile_is_not_taken_back(checkpoint: Path, store: Path) -> None:
    def export_another(line: str) -> None:
        if line.startswith("torchscript fp32"):
            card = artifact_card(store / NAME / "1")
            assert card.export
            other = dataclasses.replace(card, version=2, export=dataclasses.replace(card.export, checkpoint="0" * 64))
            write_version(store / NAME / "1", store / NAME / "2", other)

    with pytest.raises(BadOption, match="version 2 is of another checkpoint and was written meanwhile"):
        tune(checkpoint, store, export_another)
    assert sorted(path.name for path in (store / NAME).iterdir()) == ["1", "2"]


@dataclasses.dataclass(frozen=True, slots=True)
class Turning(Load):
    """A load under which half precision wins the search, and loses where candidates are measured in turns at last."""

    def measure(self, segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, seconds: float) -> Answers:
        export = segmenter.find(name).card.export
        assert export
        in_turns = seconds < QUICK[0]
        if export.precision == "fp32" and segmenter._tuning != Tuning():
            return {8: [(0.001, 1)] * 100 if in_turns else [(0.2, 1)]}
        return {8: [(0.3 if export.precision == "bf16" else 0.1, 1)]}


def test_the_turns_at_last_decide_between_candidates_however_often_each_was_measured(
    checkpoint: Path, store: Path
) -> None:
    outcome = tune(checkpoint, store, load=Turning(), always=False)
    assert outcome.is_complete and len(outcome.rows) > 2
    assert outcome.chosen.name == "torchscript fp32" and outcome.chosen.windows_per_s > 1000


class WrongOfMany(torch.nn.Module):
    """An encoder that is right for two windows in a batch and wrong for more."""

    def __init__(self, encode: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, image_B3hw: torch.Tensor) -> tuple[torch.Tensor]:
        return self.encode(-image_B3hw if image_B3hw.shape[0] > 2 else image_B3hw)  # type: ignore[no-any-return]


def make_wrong_of_many(directory: Path) -> None:
    encode = torch.jit.load(directory / "encode.ts")
    torch.jit.script(WrongOfMany(encode)).save(str(directory / "encode.ts"))
    card = artifact_card(directory)
    assert card.export
    files = card.export.files | {"encode.ts": sha256_of(directory / "encode.ts")}
    (directory / CARD).write_text(
        dump_card(dataclasses.replace(card, export=dataclasses.replace(card.export, files=files)))
    )


def test_sizes_in_which_a_graph_is_wrong_are_refused_however_fast(checkpoint: Path, store: Path) -> None:
    said, spoiled = list[str](), set[Path]()

    def spoil(line: str) -> None:
        said.append(line)
        if line.startswith("torchscript") and "windows/s" in line:
            draft = max((store / NAME).glob(f".*/{NAME}/*"))
            spoiled.add(draft)
            make_wrong_of_many(draft)

    outcome = tune(checkpoint, store, spoil, load=Known(gains_by_batches=True))
    assert outcome.tuned.windows_per_batch == 2 and len(spoiled) > 1, said
    assert any("with 8 windows" in line and "refused" in line for line in said)
    make_wrong_of_many(store / NAME / "1")
    verify_artifact(store / NAME / "1")
    with pytest.raises(ParityFailed):
        verify_artifact(store / NAME / "1", sizes=(3, 1))


@pytest.mark.slow
def test_a_version_that_nothing_is_faster_than_stays_and_it_is_said(
    checkpoint: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(store.rglob("*"))
    kept = tune(checkpoint, store, load=Known(as_it_is_s=0.2), always=False)
    assert (kept.directory, kept.chosen) == (store / NAME / "1", kept.rows[0]) and sorted(store.rglob("*")) == before
    print_tuned(kept, as_json=False)
    assert "so it stays; --always" in capsys.readouterr().out
    assert tune(checkpoint, store, load=Known(as_it_is_s=0.3), always=False).directory.name == "2"
    slower = tune(checkpoint, store, load=Known(as_it_is_s=0.1), always=True)
    assert slower.directory.name == "3" and slower.chosen.windows_per_s < slower.rows[0].windows_per_s
    print_tuned(slower, as_json=False)
    assert "the version before is faster as it is" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["card.json", "encode.ts"])
def test_what_does_not_load_is_passed_over_for_the_newest_version_that_does(
    file: str, checkpoint: Path, store: Path
) -> None:
    export_checkpoint(checkpoint, store)
    (store / NAME / "2" / file).write_bytes(b"{}")
    said: list[str] = []
    outcome = tune(checkpoint, store, said.append)
    assert "version 2 is passed over, since it does not load: " in said[0]
    assert outcome.directory.name == "3" and open_artifact(outcome.directory).card.tuned
    (store / NAME / "1" / file).write_bytes(b"{}")
    (store / NAME / "3" / file).unlink()
    with pytest.raises(BadArtifact, match=f"no version of {NAME} in .* loads here"):
        tune(checkpoint, store)


def test_a_candidate_that_outlasts_its_share_is_interrupted_and_the_time_of_all_goes_on() -> None:
    begun, was_given_up = time.perf_counter(), False
    with until(begun + 2):
        with until(begun + 1, Overdue):
            while True:
                time.sleep(0.01)
        was_given_up = True
        while True:
            time.sleep(0.01)
    assert was_given_up and time.perf_counter() - begun >= 2


def test_a_speed_is_compared_with_that_of_the_same_pictures_alone(
    checkpoint: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = tune(checkpoint, store, pictures=[near_ties(tmp_path)])
    for pictures, is_alike in (([], False), ([near_ties(tmp_path)], True)):
        speed = remeasure(outcome.directory, pictures, seconds=0)
        assert speed and speed[1] == is_alike
        card, parity = artifact_card(outcome.directory), verify_artifact(outcome.directory)
        print_parity(card, outcome.directory, as_json=False, measured=parity, speed=speed)
        shown = capsys.readouterr().out
        assert ("when it was tuned" in shown) == is_alike and ("no figure to compare" in shown) != is_alike


@pytest.mark.parametrize(("number", "taken"), [(1, [0]), (3, [0, 1, 2]), (11, [0, 1, 2, 4, 5, 7, 8, 10]), (0, [])])
def test_a_few_are_as_many_as_there_are_up_to_eight_from_the_first_to_the_last(number: int, taken: list[int]) -> None:
    assert few(range(number)) == taken


def test_no_time_leaves_the_store_as_it_was(checkpoint: Path, store: Path) -> None:
    before = sorted(store.rglob("*"))
    with pytest.raises(BadOption, match="give it more --minutes"):
        tune(checkpoint, store, minutes=0)
    assert sorted(store.rglob("*")) == before


def test_what_was_tuned_elsewhere_runs_and_says_so(
    tuned: Outcome, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card, directory = artifact_card(tuned.directory), tmp_path / NAME / "2"
    elsewhere = dataclasses.replace(tuned.tuned, processor="Difference Engine", windows_per_batch=7)
    assert card.export
    card = dataclasses.replace(card, export=dataclasses.replace(card.export, tuned=elsewhere))
    write_version(tuned.directory, directory, card)
    with caplog.at_level(logging.WARNING, "penumbra"), Segmenter(device="cpu") as segmenter:
        segmenter.load(directory)
        assert segmenter.find(NAME).windows_per_batch != 7
        assert not segmenter.is_tuned_here(card)
    assert "was tuned on Difference Engine" in caplog.text and f"`penumbra tune {NAME}`" in caplog.text
    assert summary(card, is_tuned_here=False)["tuned"] == {
        "processor": "Difference Engine", "threads": elsewhere.threads, "is_here": False,
    }  # fmt: skip


def test_goodput_counts_what_is_in_time_and_takes_the_callers_who_get_most() -> None:
    answers = {1: [(0.1, 2), (0.1, 2)], 4: [(0.2, 2)] * 8}
    assert Load().speed([answers]) == Speed(pytest.approx(40), pytest.approx(200))
    assert Load(target_ms=150).speed([answers, answers]) == Speed(pytest.approx(20), pytest.approx(100))
    assert Load("latency").callers(8) == (1,) and Load(target_ms=5).callers(8) == (1, 8, 16)


def test_a_row_is_on_the_front_unless_another_is_nowhere_worse() -> None:
    fast = Row("fast", None, 90.0, 10.0, 50.0, 0.2, 1.0, {"mIoU": -0.1})
    exact = dataclasses.replace(fast, name="exact", windows_per_s=40.0, label_flips_percent=0.0, changes={"mIoU": 0.0})
    worse = dataclasses.replace(exact, name="worse", changes={"mIoU": -0.2})
    tuned = Tuned("x", 1, 1, 1, 1, "throughput", 0, 1, 1, 1, "")
    outcome = Outcome(Path(), tuned, [fast, exact, worse], fast, {}, is_complete=True)
    assert outcome.front == [fast, exact]


def test_a_table_says_what_was_chosen_and_what_the_gate_was_held_on(
    tuned: Outcome, capsys: pytest.CaptureFixture[str]
) -> None:
    print_tuned(tuned, as_json=False)
    shown = capsys.readouterr().out
    (chosen,) = (line for line in shown.splitlines() if "> │" in line)
    assert tuned.chosen.name in chosen and "the gate was held on drawn windows" in shown and "--pictures" in shown
    print_tuned(tuned, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["chosen"]["name"] == tuned.chosen.name and document["front"]
    assert (remeasure(tuned.directory, seconds=0) or [None])[1] is True and not remeasure(tuned.directory.parent / "1")


def test_what_cannot_be_tuned_is_refused_in_a_sentence(store: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([], "name it with --checkpoint"),
        (["--checkpoint", str(near_ties(tmp_path))], "ties.png; name it with --checkpoint"),
        (["--latency", "--throughput"], "one is tuned for at a time"),
    ):
        result = CliRunner().invoke(main, ["tune", NAME, "--store", str(store), *arguments])
        assert result.exit_code == 2 and words in result.stderr


@pytest.mark.slow
def test_the_command_tunes_a_demo_model_and_verify_measures_it_again(tmp_path: Path, rng: np.random.Generator) -> None:
    photo, name = tmp_path / "a.png", "supervised-camvid"
    Image.fromarray(picture(rng, 36, 48)).resize((480, 360), Image.Resampling.BICUBIC).save(photo)
    export_checkpoint(ZOO / f"{name}.safetensors", tmp_path / "store")
    store = ["--store", str(tmp_path / "store")]
    asked = [*store, "--pictures", str(photo)]
    for minutes in ("0.5", "5"):  # a busy machine may measure nothing in the shorter time
        result = CliRunner().invoke(main, ["tune", name, *asked, "--minutes", minutes, "--always"])
        if result.exit_code == 0:
            break
    assert result.exit_code == 0, result.output
    assert "chosen" in result.stdout and "the gate was held on 1 picture" in result.stdout
    verified = CliRunner().invoke(main, ["verify", name, *asked])
    assert verified.exit_code == 0 and "when it was tuned" in verified.stdout
