"""The card: what is written is read back, and what is wrong is refused by a sentence that names the field."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.models.card import (
    Card,
    ExportFacts,
    Novelty,
    Parity,
    Provenance,
    dump_card,
    parse_card,
)
from penumbra.models.errors import BadArtifact
from penumbra.models.inputs import InputSpec, ScaleRule
from tests.conftest import toy_card

NOVELTY = Novelty("entropy", (0.1, 0.1, 0.4), num_pictures=3, num_samples=2, data="made up")


def full_card() -> Card:
    card, _ = toy_card("opposed")
    facts = ExportFacts("torchscript", "fp32", "2.13", {"encode.ts": "ab"}, Parity(0, 1e-7, 0, 1, 1), "cd")
    provenance = Provenance("CamVid", "CC", metrics={"miou": 0.5})
    return dataclasses.replace(card, export=facts, provenance=provenance, novelty=NOVELTY)


def changed(path: str, value: Any) -> str:
    """The full card's JSON with the field at a dotted path replaced."""
    return _edited(path, lambda place, key: place.__setitem__(key, value))


def without(path: str) -> str:
    return _edited(path, lambda place, key: place.__delitem__(key))


def _edited(path: str, edit: Callable[[Any, Any], None]) -> str:
    data = place = json.loads(dump_card(full_card()))
    *parents, key = [int(part) if part.isdigit() else part for part in path.split(".")]
    for parent in parents:
        place = place[parent]
    edit(place, key)
    return json.dumps(data)


def test_a_card_is_read_back_as_it_was_written() -> None:
    assert parse_card(dump_card(full_card())) == full_card()
    assert parse_card(dump_card(toy_card("latent")[0])) == toy_card("latent")[0]


def test_a_whole_number_is_read_where_a_float_is_wanted() -> None:
    temperature = parse_card(changed("readout.temperature", 2)).readout.temperature
    assert temperature == 2.0 and isinstance(temperature, float)


@pytest.mark.parametrize(
    "place", ["", "input.", "window.", "sampling.", "readout.", "novelty.", "export.", "export.parity."]
)
def test_an_unknown_field_is_named(place: str) -> None:
    with pytest.raises(BadArtifact, match="unknown field 'colour'"):
        parse_card(changed(f"{place}colour", 1))


@pytest.mark.parametrize("path", ["name", "classes", "window.height", "classes.0.color", "export.parity.max_abs"])
def test_a_missing_field_is_named(path: str) -> None:
    with pytest.raises(BadArtifact, match=f"lacks the field '{path.rpartition('.')[2]}'"):
        parse_card(without(path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 3),
        ("version", "1"),
        ("version", True),
        ("version", 1.5),
        ("config", []),
        ("classes", {}),
        ("classes.0", "red"),
        ("classes.0.name", None),
        ("classes.0.color", [1, 2]),
        ("classes.0.color.1", "green"),
        ("input", None),
        ("input.mean", 0.5),
        ("input.mean.2", "0.5"),
        ("input.order", "GBR"),
        ("window.height", 32.0),
        ("window.blend", "triangle"),
        ("window.padding", 0),
        ("window.centred", 1),
        ("sampling.kind", "ensemble"),
        ("sampling.members", "plus"),
        ("sampling.members.0", 1),
        ("readout.temperature", "1"),
        ("readout.temperature", 10**400),
        ("readout.softmax_at", None),
        ("provenance.metrics", []),
        ("provenance.metrics.miou", "half"),
        ("export.files", "encode.ts"),
        ("export.files.encode\u2024ts", 7),
        ("export.parity", 0),
    ],
)
def test_a_mistyped_field_is_named(path: str, value: Any) -> None:
    with pytest.raises(BadArtifact) as refusal:
        parse_card(changed(path, value))
    for part in path.split("."):
        assert part in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"card"', "7", '{"format": 2}', '{"format": "1"}', "{}"])
def test_text_that_is_no_card_of_this_format_is_refused(text: str) -> None:
    with pytest.raises(BadArtifact, match="card"):
        parse_card(text)


def test_text_that_no_answer_could_hold_is_refused() -> None:
    with pytest.raises(BadArtifact, match="surrogates not allowed"):
        parse_card(changed("provenance.data", "half a pair: \ud800"))
    assert parse_card(changed("provenance.data", "a whole pair: \ud83d\ude00")).provenance.data.endswith("\U0001f600")


def test_deeply_nested_json_is_refused_not_a_crash() -> None:
    with pytest.raises(BadArtifact, match="JSON"):
        parse_card("[" * 200_000)


@pytest.mark.parametrize("number", [0, 2, None, "one"])
def test_another_format_version_is_named(number: Any) -> None:
    with pytest.raises(BadArtifact, match="format"):
        parse_card(changed("format", number))


ONE_CLASS = {"name": "x", "color": [0, 0, 0]}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        *[("name", name, "name") for name in ("../escape", "a/b", "", ".hidden", "..", "a b", "x" * 200, "a\n")],
        ("classes", [], "0 classes"),
        ("classes", [ONE_CLASS] * 2, "has several classes with the name 'x'; each has a name of its own"),
        ("classes", [ONE_CLASS], "has 1 class, 'x', which every pixel would have"),
        ("classes", [ONE_CLASS] * 256, "256 classes"),
        ("classes.1.color.0", 256, "color"),
        ("classes.1.color.2", -1, "color"),
        ("window.overlap", 2, "overlap is 2"),
        ("window.overlap", -0.1, "overlap is -0.1"),
        ("window.overlap", float("nan"), "overlap is nan"),
        ("window.height", 0, "window is 0x48"),
        ("window.width", -8, "window is 32x-8"),
        ("readout.temperature", 0, "temperature is 0"),
        ("readout.temperature", -1, "temperature is -1"),
        ("readout.temperature", float("nan"), "temperature is nan"),
        ("readout.temperature", float("inf"), "temperature is inf"),
        ("input.std", [1, 0, 1], "input.std"),
        ("input.scale", 0, "input.scale"),
        ("input.scale", float("inf"), "input.scale"),
        ("input.mean.0", float("nan"), "input.mean"),
        ("input.mean", [0.5], "input.mean has 1 values and input.std 3; there are 3 input.bands"),
        ("input.bands", [], "input.bands are ; 1 to 255 plain names are wanted, each once"),
        ("input.bands", ["red", "red", "nir"], "input.bands are red, red, nir"),
        ("input.bands", ["Red", "b", "c"], "input.bands are Red, b, c"),
        ("input.bands", ["red", "nir"], "there are 2 input.bands"),
        ("input.dtype", "uint32", "input.dtype is 'uint32'; one of 'uint8', 'uint16', 'int16', 'float32' is wanted"),
        ("input.low", [0, 0, 0], "input.low is (0.0, 0.0, 0.0) and input.high (); both are empty"),
        ("input.resolution", {"kind": "frame"}, "input.resolution is frame with the value 0; frame has pixels"),
        ("input.resolution", {"kind": "gsd", "value": -1}, "input.resolution is gsd with the value -1; frame"),
        ("input.resolution", {"value": 2}, "input.resolution is none with the value 2"),
        ("sampling.default_samples", 3, "2 members and 3 default_samples"),
        ("sampling.members", [], "0 members and 2 default_samples"),
        ("sampling", {"kind": "latent", "noise_length": 3, "default_samples": 0}, "default_samples is 0"),
        ("sampling", {"kind": "dropout", "noise_length": 3, "keep": 0}, "keep is 0"),
        ("sampling", {"kind": "latent", "noise_length": -1}, "noise_length is -1"),
        ("sampling", {"kind": "single", "members": ["a", "b"]}, "members a, b and takes single samples"),
        ("sampling", {"kind": "dropout", "noise_length": 3, "keeps": [[2, 0.5]]}, "keeps are of 2 channels and"),
        ("sampling", {"kind": "dropout", "noise_length": 3, "keeps": [[2, 0.5], [1, 0]]}, "keeps[1][1] is 0"),
        ("sampling.law", "paired", "sampling.law is 'paired'; one of 'independent', 'antithetic' is wanted"),
        ("sampling", {"kind": "dropout", "noise_length": 3, "law": "antithetic"}, "only a latent's draws have a law"),
        ("window.trained", [0, 5], "window.trained"),
        ("window.max_pixels", -1, "max_pixels is -1"),
        ("prompt.alpha", -1, "prompt.alpha is -1"),
        ("prompt.alpha", float("nan"), "prompt.alpha is nan"),
        ("prompt.background", 3, "prompt.background is 3; the classes are 0 to 2"),
        ("extra_maps", [{"name": "entropy", "description": ""}], "extra_maps are entropy"),
        ("extra_maps", [{"name": "x", "description": ""}] * 2, "extra_maps are x, x"),
        ("extra_maps", [{"name": "../x", "description": ""}], "extra_maps are ../x"),
        ("extra_maps", [{"name": "labels", "description": ""}], "extra_maps are labels"),
        ("export.parity.relative", float("nan"), "export.parity"),
        ("export.parity.relative", float("inf"), "export.parity"),
        ("export.parity.miou_change", float("nan"), "export.parity"),
        ("novelty.map", "confidence", "novelty.map is confidence; it can be entropy"),
        ("novelty.map", "density", "novelty.map is density"),
        ("novelty.means", [], "has 0 novelty.means; 1 to 1,001 are wanted, ascending"),
        ("novelty.means", [0.2, 0.1], "has 2 novelty.means"),
        ("novelty.means", [0.1] * 1002, "has 1002 novelty.means"),
        ("novelty.means.1", float("nan"), "novelty.means"),
        ("novelty.warn_above", 0, "novelty.warn_above is 0"),
        ("novelty.warn_above", 1.5, "novelty.warn_above is 1.5"),
        (
            "novelty.scales",
            [[0, 1], [0, 1]],
            "novelty.scales are ((0.0, 1.0), (0.0, 1.0)); none or, where its map is not",
        ),
        ("novelty.scales", [[0, 1, 1]], "novelty.scales[0]"),
        ("novelty.scales", [[0, float("inf")], [0, 1]], "novelty.scales"),
        ("novelty.num_pictures", 0, "novelty.num_pictures is 0"),
        ("novelty.num_samples", 0, "novelty.num_samples is 0"),
        *[
            (
                "calibration",
                {"risks": risks, "entropy_nats": nats, "num_frames": 9, "num_samples": 1, "data": ""},
                named,
            )
            for risks, nats, named in (
                ([0.1, 0.2, 0.3], [0.1, float("nan"), 0.5], "nan"),
                ([0.1, float("nan"), 0.3], [0.1, 0.2, 0.5], "nan"),
            )
        ],
    ],
)
def test_contradictory_facts_are_named(path: str, value: Any, named: str) -> None:
    with pytest.raises(BadArtifact) as refusal:
        parse_card(changed(path, value))
    assert named in str(refusal.value)


def test_an_input_is_read_whole_and_what_contradicts_itself_is_named() -> None:
    spec = InputSpec(
        (0.1, 0.2), (0.3, 0.4), bands=("swir1", "nir"), dtype="int16", low=(0, 10), high=(3000, 4000), clip=True,
        resolution=ScaleRule("gsd", 10),
    )  # fmt: skip
    card = dataclasses.replace(toy_card("opposed")[0], input=spec)
    assert parse_card(dump_card(card)).input == spec
    for wrong, named in (
        (dataclasses.replace(spec, high=(3000, 10)), "a lower and a higher value for each of 2 bands"),
        (dataclasses.replace(spec, high=(3000, 4000, 5000)), "input.high (3000.0, 4000.0, 5000.0)"),
        (dataclasses.replace(spec, order="BGR"), "input.order is BGR and input.bands are swir1, nir; it is for red"),
    ):
        with pytest.raises(BadArtifact) as refusal:
            parse_card(dump_card(dataclasses.replace(card, input=wrong)))
        assert named in str(refusal.value)


def test_a_card_that_says_nothing_of_bands_is_read_as_one_of_red_green_and_blue() -> None:
    document = json.loads(dump_card(full_card()))
    document["input"] = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "scale": 255.0, "order": "BGR"}
    spec = parse_card(json.dumps(document)).input
    assert spec == InputSpec((0.1, 0.2, 0.3), (1, 2, 3), order="BGR")
    assert (spec.bands, spec.dtype, spec.resolution.kind) == (("red", "green", "blue"), "uint8", "none")


PATHS = [
    "name", "version", "method", "config", "classes", "classes.0", "classes.0.name", "classes.0.color.0", "input.mean",
    "input.mean.0", "input.std.1", "input.order", "input.bands", "input.low", "input.resolution",
    "window.height", "window.overlap", "window.padding", "sampling",
    "sampling.kind", "sampling.members", "sampling.keep", "readout.temperature", "provenance.metrics", "export",
    "export.files", "export.parity.max_abs", "format", "prompt", "prompt.alpha", "prompt.background", "prompt.members",
    "extra_maps", "window.trained", "window.max_pixels", "window.last", "readout.average", "novelty",
    "novelty.map", "novelty.means", "novelty.means.0", "novelty.warn_above", "novelty.scales",
]  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(PATHS), anything)
def test_anything_in_any_field_is_read_back_equal_or_refused(path: str, value: Any) -> None:
    with suppress(BadArtifact):
        card = parse_card(changed(path, value))
        assert dump_card(parse_card(dump_card(card))) == dump_card(card)


def test_a_map_of_the_model_s_own_may_be_what_tells_strangeness() -> None:
    card = toy_card("bright")[0]
    novelty = dataclasses.replace(NOVELTY, map="brightness", num_samples=1)
    scaled = dataclasses.replace(novelty, scales=((0.1, 0.5), (2.0, 4.0)))
    for reference in (novelty, scaled):
        assert parse_card(dump_card(dataclasses.replace(card, novelty=reference))).novelty == reference
    flat = dataclasses.replace(card, novelty=dataclasses.replace(scaled, scales=((0.1, 0.0), (2.0, 4.0))))
    with pytest.raises(BadArtifact, match="each with a deviation above 0"):
        parse_card(dump_card(flat))
    assert (novelty.maps, scaled.maps) == (("brightness",), ("entropy", "brightness"))
    assert novelty.strangeness((9.0, 0.3)) == 0.3
    assert [scaled.strangeness(means) for means in ((1.1, 2.0), (-9.0, 2.0), (0.1, 6.0), (0.1, -6.0))] == [2, 0, 1, 2]


def test_255_classes_can_be_served() -> None:
    assert parse_card(changed("classes", [ONE_CLASS | {"name": f"c{k}"} for k in range(255)])).num_classes == 255


def test_one_sample_has_no_mutual_information_and_several_have_no_seam() -> None:
    card = toy_card("bright")[0]
    assert card.maps(1) == ("confidence", "margin", "entropy", "expected_entropy", "seam", "brightness")
    assert card.maps(2) == ("confidence", "margin", "entropy", "expected_entropy", "mutual_information", "brightness")


@pytest.mark.parametrize("name", ["seam", "mutual_information", "default"])
def test_names_with_a_meaning_are_no_names_of_own_maps(name: str) -> None:
    with pytest.raises(BadArtifact, match=f"extra_maps are {name}"):
        parse_card(changed("extra_maps", [{"name": name, "description": ""}]))
