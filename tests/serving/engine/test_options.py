"""Options: whatever is wrong is refused by name, value and what would be right."""

import dataclasses
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import Limits, SegmentOptions, check_options, parse_options
from tests.conftest import toy_card

LIMITS = Limits()
FORMS = ("pointwise", "nan", "latent", "dropout", "opposed", "boxed", "tagged")
CARDS = {form: toy_card(form)[0] for form in FORMS}


def read(form: str = "latent", **fields: str) -> int:
    return check_options(parse_options(fields), CARDS[form], LIMITS)


def test_good_text_becomes_options() -> None:
    fields = {
        "model": "m",
        "version": "2",
        "samples": " 8 ",
        "seed": "9",
        "overlap": "0.5",
        "outputs": "entropy, margin",
    }
    assert parse_options(fields) == SegmentOptions("m", 2, 8, 9, 0.5, ("entropy", "margin"))
    assert parse_options({}) == SegmentOptions()


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("samples", "0", "1 to 64"),
        ("samples", "-3", "1 to 64"),
        ("samples", "65", "1 to 64"),
        ("samples", "1000000000", "1 to 64"),
        ("samples", "x", "whole number"),
        ("samples", "", "whole number"),
        ("samples", "1e3", "whole number"),
        ("samples", "4.0", "whole number"),
        ("samples", "--5", "whole number"),
        ("samples", "-", "whole number"),
        ("samples", "٣", "whole number"),
        ("samples", "1_000", "whole number"),
        ("samples", "9" * 5000, "whole number"),
        ("seed", "-1", "0 to 2^63 - 1"),
        ("seed", str(2**63), "0 to 2^63 - 1"),
        ("seed", str(2**64), "whole number"),
        ("seed", "0x10", "whole number"),
        ("version", "newest", "whole number"),
        ("overlap", "1.5", "0 to 0.9"),
        ("overlap", "-0.1", "0 to 0.9"),
        ("overlap", "nan", "0 to 0.9"),
        ("overlap", "inf", "0 to 0.9"),
        ("overlap", "abc", "0 to 0.9"),
        ("overlap", "", "0 to 0.9"),
        ("overlap", "1e999", "0 to 0.9"),
        ("priority", "4", "1 (first) to 3"),
        ("priority", "-1", "1 (first) to 3"),
        ("priority", "high", "whole number"),
    ],
)
def test_bad_text_is_refused_by_name_value_and_what_is_right(name: str, text: str, right: str) -> None:
    with pytest.raises(BadOption) as refusal:
        read(**{name: text})
    sentence = str(refusal.value)
    assert sentence.startswith(f"{name} is ") and right in sentence
    assert len(sentence) < 200
    shown = "inf" if text == "1e999" else text.strip()[:40]
    assert shown in sentence


def test_an_unknown_option_is_named_beside_the_known_ones() -> None:
    with pytest.raises(BadOption, match=r"no option 'sample'; known are model, .*samples.*outputs"):
        read(sample="3")


def test_an_unknown_output_is_named_beside_the_known_ones() -> None:
    with pytest.raises(BadOption, match=r"no output 'variance'; toy-latent has confidence, .*mutual_information"):
        read(outputs="entropy,variance")


@pytest.mark.parametrize(
    ("form", "more", "output"),
    [
        ("pointwise", {}, "mutual_information"),
        ("nan", {}, "mutual_information"),
        ("boxed", {}, "mutual_information"),
        ("tagged", {"tags": "red"}, "mutual_information"),
        ("latent", {"samples": "1"}, "mutual_information"),
        ("dropout", {"samples": "1"}, "mutual_information"),
        ("latent", {}, "seam"),
        ("opposed", {}, "seam"),
        ("boxed", {"boxes": "[[1, 1, 5, 5, 0]]"}, "seam"),
    ],
)
def test_a_map_that_an_answer_has_not_is_refused_by_name_and_absent_by_default(
    form: str, more: dict[str, str], output: str
) -> None:
    other = {"mutual_information": "seam", "seam": "mutual_information"}[output]
    with pytest.raises(BadOption, match=rf"no output '{output}'; toy-{form} has .*\b{other}\b.* where samples is \d"):
        read(form, outputs=output, **more)
    read(form, outputs=f"default,{other}", **more)
    usual = parse_options(more).maps(CARDS[form])
    assert usual == ("confidence", "entropy", *(("mutual_information",) if output == "seam" else ()))


@pytest.mark.parametrize(("form", "what"), [("opposed", "has 2 members"), ("pointwise", "is not sampled")])
def test_fixed_samples_cannot_be_chosen(form: str, what: str) -> None:
    default = CARDS[form].sampling.default_samples
    assert read(form) == read(form, samples=str(default)) == default
    with pytest.raises(BadOption, match=f"samples is 7; toy-{form} {what}, so samples is {default} or left out"):
        read(form, samples="7")


def test_the_cards_default_is_drawn_when_samples_are_left_out() -> None:
    assert read("latent") == 4
    assert read("latent", samples="64") == 64


def test_the_largest_seed_is_taken() -> None:
    assert read(seed=str(2**63 - 1)) == 4


def test_limits_are_the_callers() -> None:
    with pytest.raises(BadOption, match="1 to 2 is possible"):
        check_options(SegmentOptions(), CARDS["latent"], dataclasses.replace(LIMITS, samples=2))


@given(st.dictionaries(st.sampled_from(("model", "version", "samples", "seed", "overlap", "outputs")), st.text()))
def test_any_text_is_read_or_refused(fields: dict[str, str]) -> None:
    with suppress(BadOption):
        read(**fields)


def test_a_number_that_is_too_long_is_not_called_none() -> None:
    with pytest.raises(BadOption, match="a whole number of at most 19 digits is wanted"):
        parse_options({"seed": "9" * 20})
