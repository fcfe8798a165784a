"""Imports are strict: every tensor of a published file is used, a proven copy, or named as left out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from penumbra.export.importer import import_checkpoint
from penumbra.models.card import ClassInfo, Readout, Sampling, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.classes import VOC
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.serving.engine.store import sha256_of
from tests.export.tiny import state

pytestmark = pytest.mark.usefixtures("two_more_methods")
THREE = tuple(ClassInfo(name, (k, k, k)) for k, name in enumerate("abc"))
MEMORY = torch.arange(12.0).reshape(3, 4)


def imported(tmp_path: Path, *contents: object, **options: object) -> tuple[dict[str, Tensor], object]:
    """The loaded network's tensors, and what the import said."""
    files = []
    for i, content in enumerate(contents):
        files.append(tmp_path / f"published{i}.pth")
        torch.save(content, files[-1])
    said = import_checkpoint("tiny", files, tmp_path / "ours.safetensors", **{"classes": THREE, **options})  # type: ignore[arg-type]
    card, network = load_checkpoint(tmp_path / "ours.safetensors")
    assert card == said.card
    return network.state_dict(), said


def refused(tmp_path: Path, *contents: object, words: tuple[str, ...], kind: type = BadCheckpoint, **options) -> None:
    with pytest.raises(kind) as caught:
        imported(tmp_path, *contents, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


# -- finding and renaming the tensors -------------------------------------------------------------


def test_every_tensor_arrives_under_our_name_and_the_rest_is_named(tmp_path: Path) -> None:
    theirs = state()
    ours, said = imported(tmp_path, {"epoch": 3, "teacher": theirs, "memory": MEMORY}, protocol="penumbra")
    for branch, letter in enumerate("ab"):
        assert torch.equal(ours[f"branches.{branch}.0.weight"], theirs[f"tiny_{letter}.conv.weight"])
        assert torch.equal(ours[f"branches.{branch}.1.running_var"], theirs[f"tiny_{letter}.bn.running_var"])
    assert torch.equal(ours["centres"], MEMORY)
    assert (said.train_only, said.entries, said.warnings) == (("aux.weight",), ("epoch",), ())


def test_a_protocol_that_does_without_a_branch_names_its_tensors_as_left_out(tmp_path: Path) -> None:
    ours, said = imported(tmp_path, {"teacher": state(), "memory": MEMORY})
    assert not any(key.startswith("branches.1.") for key in ours)
    second = {key for key in state() if key.startswith("tiny_b.") and not key.endswith("num_batches_tracked")}
    assert {*said.train_only} == {"aux.weight", *second}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"model": tensors},
        lambda tensors: {"model": {"x": torch.zeros(1)}, "teacher": tensors},
        lambda tensors: {"teacher": {}, "model": tensors},
        lambda tensors: {"model": {f"module.{key}": value for key, value in tensors.items()}},
        lambda tensors: {f"module.module.{key}": value for key, value in tensors.items()},
        lambda tensors: {"model": {key: nn.Parameter(value.float()) for key, value in tensors.items()}},
    ],
    ids=["bare", "contained", "best container", "filled container", "parallel", "twice parallel", "parameters"],
)
def test_the_state_dict_is_found_where_files_keep_it(tmp_path: Path, wrap) -> None:
    ours, _ = imported(tmp_path, wrap(state()))
    assert torch.equal(ours["branches.0.0.weight"], state()["tiny_a.conv.weight"])


def test_the_longest_prefix_decides(tmp_path: Path) -> None:
    _, said = imported(tmp_path, state() | {"tiny_a.conv.helper.weight": torch.zeros(1)})
    assert "tiny_a.conv.helper.weight" in said.train_only


@pytest.mark.parametrize("counter", [torch.tensor(3.0), torch.tensor(3), None])
def test_the_counters_of_batch_norm_may_be_anything_or_missing(tmp_path: Path, counter: Tensor | None) -> None:
    tensors = state()
    for key in [key for key in tensors if key.endswith("num_batches_tracked")]:
        tensors.pop(key) if counter is None else tensors.update({key: counter})
    imported(tmp_path, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = {key: value.to(dtype) for key, value in state().items()}
    ours, _ = imported(tmp_path, theirs)
    assert ours["branches.0.0.weight"].dtype == torch.float32
    assert torch.equal(ours["branches.0.0.weight"], theirs["tiny_a.conv.weight"].float())


# -- copies, and what stands beside ---------------------------------------------------------------


def test_a_second_copy_of_a_tensor_is_dropped_when_it_is_one(tmp_path: Path) -> None:
    tensors = state()
    imported(tmp_path, tensors | {"copy.conv.weight": tensors["tiny_a.conv.weight"].clone()})
    different = tensors | {"copy.conv.weight": tensors["tiny_a.conv.weight"] + 1e-6}
    (tmp_path / "ours.safetensors").unlink()
    refused(tmp_path, different, words=("copy.conv.weight", "tiny_a.conv.weight", "differ"))
    refused(tmp_path, tensors | {"copy.bn.what": torch.zeros(1)}, words=("copy.bn.what", "tiny_a.bn.what"))


def test_what_may_stand_beside_and_does_not_is_zero_with_a_warning(tmp_path: Path) -> None:
    ours, said = imported(tmp_path, {"model": state()})
    assert not ours["centres"].any() and said.warnings[0] == "the centres are zero"


def test_a_second_file_of_what_stands_beside_completes_the_first_and_goes_before_it(tmp_path: Path) -> None:
    for first in ({"model": state()}, {"model": state(), "memory": torch.zeros(3, 4)}):
        ours, said = imported(tmp_path, first, {"memory": MEMORY})
        assert torch.equal(ours["centres"], MEMORY) and "zero" not in "".join(said.warnings)
        assert "published0.pth" in said.card.provenance.recipe and "published1.pth" in said.card.provenance.recipe


@pytest.mark.parametrize("classes", [None, THREE[:1]])
def test_a_network_of_one_channel_is_refused(tmp_path: Path, classes: tuple[ClassInfo, ...] | None) -> None:
    refused(tmp_path, state(num_classes=1), words=("1 class", "two or more are needed"), classes=classes)


def test_two_files_of_one_kind_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, state(), state(seed=1), words=("tiny; tiny",), kind=BadOption)


# -- strictness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in state() if key.startswith("tiny_a.") and "tracked" not in key])
def test_every_missing_tensor_is_missed_by_both_names(tmp_path: Path, key: str) -> None:
    tensors = state()
    del tensors[key]
    refused(tmp_path, tensors, words=() if key == "tiny_a.conv.weight" else ("lacks the tensor branches.0", key))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    tensors = {key: value for key, value in state().items() if ".bn." not in key}
    tensors = {key: value for key, value in tensors.items() if key != "tiny_a.conv.bias"}
    refused(tmp_path, tensors, words=("tiny_a.conv.bias", "... (5 in all)"))


def test_unknown_tensors_are_named_and_counted(tmp_path: Path) -> None:
    strange = {f"strange.{i}": torch.zeros(1) for i in range(9)}
    refused(tmp_path, state() | strange, words=("tiny has no place for strange.0, strange.1", "(9 in all)"))


def test_a_tensor_that_the_network_has_no_place_for_is_named_by_both_names(tmp_path: Path) -> None:
    refused(tmp_path, state() | {"tiny_a.bn.extra": torch.zeros(1)}, words=("branches.0.1.extra", "tiny_a.bn.extra"))


def test_a_wrong_shape_is_named_with_the_right_one(tmp_path: Path) -> None:
    tensors = state() | {"tiny_a.bn.weight": torch.zeros(5)}
    refused(tmp_path, tensors, words=("branches.0.1.weight (there tiny_a.bn.weight) is [5] and should be [3]",))


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    refused(tmp_path, state() | {"tiny_a.bn.weight": torch.ones(3, dtype=torch.int64)}, words=("whole numbers [3]",))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = state()
    tensors["tiny_a.bn.bias"][1] = value
    refused(tmp_path, tensors, words=("tiny_a.bn.bias", "NaN or infinity"))


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensors = state() | {"tiny_a.bn.bias": torch.full((3,), 1e300, dtype=torch.float64)}
    refused(tmp_path, tensors, words=("tiny_a.bn.bias", "NaN or infinity"))


@pytest.mark.parametrize(
    "value",
    [
        3,
        "weights",
        torch.zeros(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(1).expand(3),
        torch.zeros(3, device="meta"),
    ],
    ids=["number", "text", "sparse", "complex", "expanded", "meta"],
)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, value: object) -> None:
    refused(tmp_path, state() | {"tiny_a.bn.bias": value}, words=("tiny_a.bn.bias is no plain tensor",))


# -- recognising ----------------------------------------------------------------------------------


def test_a_file_of_another_method_is_told_apart(tmp_path: Path) -> None:
    refused(tmp_path, {"model": state("other")}, words=("no checkpoint of tiny", "looks like other, other"))


def test_a_file_of_no_known_layout_is_described_by_its_keys(tmp_path: Path) -> None:
    tensors = {f"layer{i}.weight": torch.zeros(1) for i in range(6)}
    refused(tmp_path, {"net": tensors, "epoch": 1}, words=("tiny; tiny centres", "layer0.weight", "(6 in all)"))
    refused(tmp_path, nn.Linear(2, 2), words=("one object", "state_dict"))
    refused(tmp_path, [1, 2], words=("one object",))
    refused(tmp_path, {}, words=("holds nothing",))


def test_a_method_without_published_files_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="nothing is published for the method 'toy'"):
        import_checkpoint("toy", [tmp_path / "a.pth"], tmp_path / "ours.safetensors")


# -- the card -------------------------------------------------------------------------------------


def test_the_card_carries_the_chosen_protocol_and_where_the_weights_come_from(tmp_path: Path) -> None:
    _, published = imported(tmp_path, state())
    _, ours = imported(tmp_path, state(), protocol="penumbra")
    assert published.card.window == WindowSpec(0, 0) and published.card.readout.average == "logits"
    assert (published.card.sampling.default_samples, published.card.sampling.noise_per) == (20, "window")
    assert ours.card.window == WindowSpec(64, 64) and ours.card.readout == Readout()
    assert (ours.card.sampling.default_samples, ours.card.sampling.noise_per) == (4, "image")
    assert (published.card.config["branches"], ours.card.config["branches"]) == (1, 2)
    assert published.card.name == "ours" and published.card.input.mean == (0, 0, 0)
    provenance = published.card.provenance
    assert sha256_of(tmp_path / "published0.pth") in provenance.recipe and "published0.pth, tiny" in provenance.recipe
    assert provenance.commit == "someone/tiny 0123abc"


def test_another_sampling_is_chosen_by_name(tmp_path: Path) -> None:
    _, said = imported(tmp_path, state(), sampling="dropout")
    assert said.card.sampling == Sampling(kind="dropout", noise_length=4, default_samples=8)
    (tmp_path / "ours.safetensors").unlink()
    words = ("tiny.sampling is 'magic'", "'latent', 'dropout'")
    refused(tmp_path, state(), sampling="magic", words=words, kind=BadOption)


def test_classes_come_from_the_data_set_with_as_many(tmp_path: Path) -> None:
    _, said = imported(tmp_path, state(num_classes=21), classes=None)
    assert said.card.classes == VOC
    (tmp_path / "ours.safetensors").unlink()
    refused(tmp_path, state(), classes=None, words=("3 classes", "--classes"), kind=BadOption)
    refused(tmp_path, state(), classes=VOC, words=("21 classes are named", "has 3"), kind=BadOption)


@pytest.mark.parametrize("name", ["ours.pth", "a b.safetensors", ".safetensors"])
def test_the_output_is_a_plain_name_with_our_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadOption, match="safetensors is wanted"):
        import_checkpoint("tiny", [tmp_path / "a.pth"], tmp_path / name)
