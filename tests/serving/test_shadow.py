"""A new version beside the served one: what is compared, what is refused, and what it has to show to be promoted."""

import dataclasses
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from penumbra.__main__ import main
from penumbra.export.bundle import export_network
from penumbra.models.card import ClassInfo
from penumbra.models.errors import BadArtifact, BadOption, NotPromoted
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.compare import Compared, Failed, Question, options_for, reply
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.plan import resolve
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import PROMOTED, artifact_card, find_promoted, promote
from penumbra.serving.promotion import LEAST_PICTURES, LEAST_PIXELS, Figures, check_figures, read_condition
from penumbra.serving.shadow import Candidate, Shadow, check_alike
from penumbra.serving.telemetry import Telemetry
from tests.conftest import FIXED, picture
from tests.serving.http.asking import PICTURE as PICTURE_TYPE
from tests.serving.http.asking import ask, is_refused, png
from tests.serving.in_process import in_process
from tests.serving.server import serving, until
from tests.toys import CLASSES, toy_card

MODEL = "toy-pointwise"
PICTURE = picture(np.random.Generator(np.random.PCG64(3)), 90, 120)
CLEAR_HW = (np.diff(np.sort(PICTURE.astype(int), axis=-1)) > 0).all(-1)
"""Where no two channels are alike, so that the largest logit is another one than the smallest."""


def export(
    store: Path, *, form: Any = "pointwise", gain: float = 8.0, classes: tuple[ClassInfo, ...] = CLASSES
) -> Path:
    card, _ = toy_card(form, name=MODEL)
    network = ToyNetwork(ToyConfig(3, form, gain))
    card = dataclasses.replace(card, config=dataclasses.asdict(network.config), classes=classes)
    return export_network(network, card, store)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    export(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def segmenter() -> Iterator[Segmenter]:
    with Segmenter(threads=1, tuning=FIXED) as segmenter:
        yield segmenter


def compared(segmenter: Segmenter, served: Path, candidate: Path, **options: Any) -> Compared:
    card = segmenter.load(served)
    asked = resolve(SegmentOptions(**options), card, segmenter.limits)
    answer = reply(segmenter, Question(served, candidate, png(PICTURE), asked))
    assert isinstance(answer, Compared), answer
    return answer


def test_the_same_network_again_flips_nothing_and_one_turned_round_every_clear_pixel(
    store: Path, segmenter: Segmenter
) -> None:
    served = store / MODEL / "1"
    same = compared(segmenter, served, export(store))
    assert (same.num_pixels, same.num_flipped, same.entropy_nats) == (90 * 120, 0, 0.0) and min(same.seconds) > 0
    turned = compared(segmenter, served, export(store, gain=-8.0))
    assert CLEAR_HW.sum() <= turned.num_flipped <= CLEAR_HW.size


def test_samples_of_the_same_seed_are_compared_and_a_steeper_network_is_surer(
    tmp_path: Path, segmenter: Segmenter
) -> None:
    served, same, steep = (export(tmp_path, form="latent", gain=gain) for gain in (8.0, 8.0, 80.0))
    assert compared(segmenter, served, same, seed=7, samples=3).num_flipped == 0
    assert compared(segmenter, served, steep, seed=7).entropy_nats < -0.1


def test_labels_that_the_caller_had_withheld_are_compared_too_and_what_was_left_to_the_model_is_left_to_each() -> None:
    card, _ = toy_card("latent")
    asked = SegmentOptions(model=card.name, version=1, samples=4, views="none", seed=9, max_risk=0.1, deadline_ms=5.0)
    own = options_for(dataclasses.replace(card, version=2), asked, served=card)
    assert own == SegmentOptions(model=card.name, version=2, seed=9, outputs=())
    assert options_for(card, dataclasses.replace(asked, samples=3), served=card).samples == 3


def test_a_candidate_that_fails_on_a_picture_fails_and_one_that_is_broken_is_refused(
    store: Path, segmenter: Segmenter
) -> None:
    served, white = store / MODEL / "1", np.full((40, 50, 3), 255, np.uint8)
    asked = resolve(SegmentOptions(), segmenter.load(served), segmenter.limits)
    failed = reply(segmenter, Question(served, export(store, form="nan"), white, asked))
    assert isinstance(failed, Failed) and not failed.is_refused
    broken = export(store)
    (broken / "decode.ts").write_bytes(b"broken")
    refused = reply(segmenter, Question(served, broken))
    assert isinstance(refused, Failed) and refused.is_refused and "decode.ts was changed" in refused.why
    failed = reply(segmenter, Question(broken, served))
    assert isinstance(failed, Failed) and not failed.is_refused, "it is the served version that is broken"


def figures(**changed: Any) -> Figures:
    known = {"num_pictures": 200, "num_pixels": 2_000_000, "num_flipped": 8_000, "served_s": 10.0, "candidate_s": 12.0}
    return Figures(**(known | {"entropy_nats": 4.0} | changed))


@pytest.mark.parametrize(
    ("text", "holds"),
    [("flips < 0.5 %", True), ("flips<0.4%", False), ("flips <= 0.004", True), ("entropy < 0.02", False),
     ("entropy > -0.01", True), ("latency < 1.1", False), ("latency <= 120 %", True), ("failures < 1e-3", True)],
)  # fmt: skip
def test_a_condition_holds_or_the_sentence_says_which_does_not_with_its_value_and_extent(
    text: str, holds: bool
) -> None:
    if holds:
        return check_figures(figures(), [read_condition(text)], "m version 2")
    with pytest.raises(NotPromoted) as refused:
        check_figures(figures(), [read_condition(text)], "m version 2")
    assert f"{text} does not hold" in str(refused.value) and "200 pictures with 2,000,000 pixels" in str(refused.value)


def test_failures_forbid_a_promotion_unless_a_condition_allows_them() -> None:
    failing = figures(num_failed=1)
    with pytest.raises(NotPromoted, match=r"failures <= 0 % does not hold, failures is 0\.498 %"):
        check_figures(failing, [read_condition("flips < 1 %")], "m version 2")
    check_figures(failing, [read_condition("flips < 1 %"), read_condition("failures < 1 %")], "m version 2")


@pytest.mark.parametrize("text", ["latency < 9", "latency > 0"])
def test_a_latency_of_which_nothing_was_measured_meets_no_condition(text: str) -> None:
    with pytest.raises(NotPromoted, match=f"{text} does not hold, latency is not measured"):
        check_figures(figures(served_s=0.0, candidate_s=0.0), [read_condition(text)], "m version 2")


@pytest.mark.parametrize("few", [{"num_pictures": LEAST_PICTURES - 1}, {"num_pixels": LEAST_PIXELS - 1}])
def test_too_few_pictures_or_pixels_promote_nothing(few: dict[str, int]) -> None:
    with pytest.raises(NotPromoted, match="at least 100 pictures with 1,000,000 pixels"):
        check_figures(figures(**few), [read_condition("flips < 100 %")], "m version 2")


@pytest.mark.parametrize("text", ["", "flips", "flips < x", "flips = 0", "mIoU > 0.5", "flips < 0.5 % or so"])
def test_what_is_no_condition_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(BadOption, match=r"flips < 0\.5 %"):
        read_condition(text)


def test_a_class_that_is_swapped_renamed_or_new_is_refused_in_a_sentence_that_names_it() -> None:
    card, _ = toy_card("pointwise")
    for classes, words in (
        ((CLASSES[1], CLASSES[0], CLASSES[2]), "class 0 of toy-pointwise version 1 is 'green' and 'red' in version 1"),
        ((*CLASSES[:2], ClassInfo("water", (0, 0, 200))), "class 2 of .* is 'water' and 'blue'"),
        ((*CLASSES, ClassInfo("rest", (9, 9, 9))), "has 4 classes and version 1, which is served, 3"),
    ):  # fmt: skip
        with pytest.raises(BadArtifact, match=words):
            check_alike(card, dataclasses.replace(card, classes=classes))
    recoloured = tuple(dataclasses.replace(one, color=(1, 2, 3)) for one in CLASSES)
    check_alike(card, dataclasses.replace(card, classes=recoloured))


def test_the_version_that_was_promoted_stays_the_served_one_and_the_first_is_promoted_by_itself(store: Path) -> None:
    assert find_promoted(store, MODEL) == store / MODEL / "1"
    newest = export(store)
    assert find_promoted(store, MODEL) == store / MODEL / "1"
    promote(newest)
    export(store)
    assert find_promoted(store, MODEL) == newest and (store / MODEL / PROMOTED).read_text() == "2\n"
    newest.rename(store / "elsewhere")
    assert find_promoted(store, MODEL) == store / MODEL / "1"


@pytest.mark.parametrize("text", ["", "v1", "\xff"])
def test_a_promoted_version_that_cannot_be_read_promotes_nothing_and_is_left_as_it_is(store: Path, text: str) -> None:
    mark = store / MODEL / PROMOTED
    mark.write_text(text, "latin-1")
    with pytest.raises(BadArtifact, match="promoted cannot be read as a number; write the version to serve into it"):
        find_promoted(store, MODEL)
    assert mark.read_text("latin-1") == text


def test_a_model_whose_promoted_version_has_gone_is_refused_alone_until_another_is_promoted(
    store: Path, tmp_path: Path
) -> None:
    card, network = toy_card("latent")
    export_network(network, card, store)
    export(store).with_name(PROMOTED).write_text("1\n")
    (store / MODEL / "1").rename(tmp_path / "pruned")
    with in_process(store, tmp_path, model_control=True, shadow_share=0.5) as client:
        why = f"{MODEL}/promoted names version 1, which has gone; write one that is there into it: 2"
        assert client.get("/models").json()["refused"] == [{"name": MODEL, "error": why}]
        is_refused(client.post(f"/v2/repository/models/{MODEL}/load"), 500, why)
        promote(store / MODEL / "2")
        assert client.post(f"/v2/repository/models/{MODEL}/load").status_code == 200
        assert not client.get("/models").json()["refused"]


def test_a_version_that_comes_under_the_number_of_another_is_compared_as_what_it_is(
    store: Path, segmenter: Segmenter
) -> None:
    served, newest = store / MODEL / "1", export(store)
    assert compared(segmenter, served, newest).num_flipped == 0
    rmtree(newest)
    assert export(store, gain=-8.0) == newest
    assert compared(segmenter, served, newest).num_flipped >= CLEAR_HW.sum()


def test_what_was_measured_of_a_version_promotes_no_other_that_has_come_under_its_number(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penumbra.serving.promotion.LEAST_PICTURES", 0)
    monkeypatch.setattr("penumbra.serving.promotion.LEAST_PIXELS", 0)
    find_promoted(store, MODEL)
    newest, other = export(store), export(store, gain=-8.0)
    card = (other / "card.json").read_text().replace('"version": 3', '"version": 2')
    (other / "card.json").write_text(card)
    other.rename(tmp_path / "other")
    with in_process(store, tmp_path, model_control=True, shadow_share=0.5) as client:
        ask_to = partial(client.post, f"/v2/repository/models/{MODEL}/promote", json={"if": ["flips < 1 %"]})
        client.post(f"/v2/repository/models/{MODEL}/load")
        newest.rename(tmp_path / "measured")
        (tmp_path / "other").rename(newest)
        is_refused(ask_to(), 409, "version 2 has changed since it was measured; let it run again")
        assert ask(client).headers["X-Penumbra-Version"] == "1"
        assert ask_to().status_code == 200 and ask(client).headers["X-Penumbra-Version"] == "2"


def test_a_question_that_cannot_be_put_keeps_nobodys_place(store: Path, segmenter: Segmenter) -> None:
    served, newest = store / MODEL / "1", export(store)
    shadow, candidate = Shadow(1.0, segmenter, Telemetry()), Candidate(served, newest, artifact_card(newest))
    shadow._candidates[MODEL], shadow._num_waiting = candidate, 1
    shadow._work(candidate, Question(served, newest, lambda: None, SegmentOptions()))  # type: ignore[arg-type]
    assert (shadow._num_waiting, candidate.figures.num_failed) == (0, 1)
    shadow.close()


def test_the_requests_of_a_candidate_are_counted_from_zero(store: Path, segmenter: Segmenter) -> None:
    telemetry, newest = Telemetry(), export(store)
    shadow = Shadow(1.0, segmenter, telemetry)
    shadow.consider(store / MODEL / "1", newest)
    shadow.close()
    labels = {"model": MODEL, "version": newest.name, "outcome": "compared"}
    assert telemetry.registry.get_sample_value("penumbra_shadow_requests_total", labels) == 0


def test_a_server_without_a_shadow_says_how_to_have_one(store: Path, tmp_path: Path) -> None:
    with in_process(store, tmp_path, model_control=True) as client:
        asked = client.post(f"/v2/repository/models/{MODEL}/promote", json={"if": ["flips < 1 %"]})
        is_refused(asked, 403, "PENUMBRA_SHADOW_SHARE")


def test_a_new_version_is_listed_and_not_served_and_one_with_swapped_classes_is_refused(
    store: Path, tmp_path: Path
) -> None:
    with in_process(store, tmp_path, model_control=True, shadow_share=0.5) as client:
        export(store)
        assert client.post(f"/v2/repository/models/{MODEL}/load").status_code == 200
        served, shadow = client.post("/v2/repository/index").json()
        assert (served["version"], served["state"], shadow["version"]) == ("1", "READY", "2")
        assert shadow["reason"].startswith("in the shadow of version 1: flips 0 %")
        assert client.post("/v2/repository/index", json={"ready": True}).json() == [served]
        for conditions, status, words in ((["flips < 1 %"], 409, "at least 100 pictures"), ([], 400, "a list"),
                                          (["good"], 400, "the condition is 'good'")):  # fmt: skip
            asked = client.post(f"/v2/repository/models/{MODEL}/promote", json={"if": conditions})
            is_refused(asked, status, words)
        export(store, classes=(CLASSES[1], CLASSES[0], CLASSES[2]))
        is_refused(client.post(f"/v2/repository/models/{MODEL}/load"), 500, "class 0", "'green'", "same order")
        assert ask(client).headers["X-Penumbra-Version"] == "1"
        assert len(client.post("/v2/repository/index").json()) == 1


def promoted(url: str, *conditions: str, key_file: Path | None = None) -> Result:
    key = ["--key-file", str(key_file)] if key_file else []
    return CliRunner().invoke(
        main, ["promote", MODEL, "--url", url, *key, *(part for c in conditions for part in ("--if", c))]
    )


def test_the_verb_says_what_a_server_says_and_where_there_is_none() -> None:
    for url, words in (("127.0.0.1:1", "--url is '127.0.0.1:1'"), ("http://127.0.0.1:1", "no server answers")):
        result = promoted(url, "flips < 1 %")
        assert result.exit_code != 0 and words in result.stderr and result.stderr.count("\n") == 1


def test_the_verb_ends_in_a_sentence_whatever_answers_and_shows_no_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the release\na-secret-of-somebodys\n")
    for url, key_file in (("http://[::1", None), ("http://127.0.0.1:1", keys)):
        result = promoted(url, "flips < 1 %", key_file=key_file)
        assert result.exit_code != 0 and result.stderr.count("\n") == 1 and "secret" not in result.output


def shadow_processes(parent: int) -> list[int]:
    """The processes below a server that compare."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_ours = b"penumbra.serving.compare" in (directory / "cmdline").read_bytes()
            if is_ours and _descends(int(directory.name), parent):
                found.append(int(directory.name))
    return found


def _descends(pid: int, parent: int) -> bool:
    while pid not in (0, parent):
        pid = int(re.findall(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0])
    return pid == parent


def measured(client: httpx.Client) -> dict[str, float]:
    lines = re.findall(r"^(penumbra_shadow_\S+) (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


@pytest.mark.slow
def test_a_real_server_compares_beside_its_work_outlives_the_comparing_process_and_promotes(
    store: Path, tmp_path: Path
) -> None:
    find_promoted(store, MODEL)
    export(store)
    settings = {"model_control": True, "shadow_share": 1, "watch_store_s": 0.1, "predrain_s": 0}
    with serving(store, tmp_path, **settings) as server, server.client() as client:
        body, alone = png(PICTURE), ask(client, png(PICTURE), accept=PICTURE_TYPE)

        def compares(version: int, number: int) -> bool:
            """Ask once more; whether so many pictures were compared."""
            for pid in shadow_processes(server.process.pid):
                with suppress(OSError):  # tests beside this one would leave nothing to the idle class
                    os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
            answer = ask(client, body, accept=PICTURE_TYPE)
            assert answer.content == alone.content and answer.headers["X-Penumbra-Version"] == "1"
            name = f'penumbra_shadow_requests_total{{model="{MODEL}",outcome="compared",version="{version}"}}'
            return measured(client).get(name, 0) >= number

        until(lambda: compares(2, 1))
        (pid,) = shadow_processes(server.process.pid)
        os.kill(pid, signal.SIGKILL)
        until(lambda: compares(2, LEAST_PICTURES))
        assert measured(client)[f'penumbra_shadow_flipped_pixels_total{{model="{MODEL}",version="2"}}'] == 0
        figures = measured(client)
        assert figures[f'penumbra_shadow_requests_total{{model="{MODEL}",outcome="failed",version="2"}}'] <= 1
        assert promoted(server.url, "flips < 0.5 %", "failures < 5 %").exit_code == 0
        assert ask(client, body).headers["X-Penumbra-Version"] == "2" and find_promoted(store, MODEL).name == "2"
        until(lambda: not shadow_processes(server.process.pid))
    assert not shadow_processes(server.process.pid)
