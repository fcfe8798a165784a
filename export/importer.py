"""A published checkpoint becomes one of ours: recognised by its layout, renamed strictly, nothing left unsaid.

read_torch_file, read_published of each file -> the method's `assemble` -> network, compared by name -> card -> file.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from penumbra.export.layouts import PublishedFile, published_name, read_published
from penumbra.export.pickles import read_torch_file
from penumbra.models import find_method
from penumbra.models.card import Card, ClassInfo, Provenance, dump_card, parse_card
from penumbra.models.checkpoint import check_output, fill_network, save_checkpoint
from penumbra.models.classes import TABLES
from penumbra.models.contract import Method, Network
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.models.layout import Assembly, Protocol
from penumbra.models.strict import read_strict
from penumbra.serving.engine.store import sha256_of

IMPORTED = "imported from "
"""How the recipe of an imported checkpoint begins."""


@dataclass(frozen=True, slots=True)
class Imported:
    """The outcome of an import: the card that was made, and what was left out.

    train_only: names, as in the files, of tensors that inference does not need, or that the chosen protocol does not.
    warnings: sentences about what the answers will not mean. entries: what else stood at the files' top level. notes:
    sentences about what was found.
    """

    card: Card
    train_only: tuple[str, ...]
    warnings: tuple[str, ...]
    entries: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def import_checkpoint(
    method: str, files: Sequence[Path], output: Path, *, classes: tuple[ClassInfo, ...] | None = None,
    protocol: Literal["published", "penumbra"] = "published", sampling: str | None = None,
) -> Imported:  # fmt: skip
    """Read the published files of one network, write it to `output` with a card, and say what was left out.

    classes: by default those of the data set that has as many. protocol: how the paper's code runs the network, or how
    we would. sampling: value of the configuration's field of that name, where the method has one.

    Raises BadOption, and BadCheckpoint: a file is unreadable, of another kind, incomplete, or not finite. Then nothing
    is written.
    """
    check_output(output, made_by=IMPORTED, sources=files)
    found = find_method(method)
    where = ", ".join(map(str, files))
    contents = _read_files(found, files, where=where)
    assembly = _assemble(found, contents, where=where)
    config, run = _choose(assembly, protocol, sampling, method=method)
    class_infos = _classes(classes, config.num_classes)
    network = found.build(config).eval()
    unused = _fill(network, contents, run, where=where)
    card_sampling = network.sampling
    if not sampling and card_sampling.is_stochastic:
        card_sampling = dataclasses.replace(card_sampling, default_samples=run.default_samples, noise_per=run.noise_per)
    kinds = zip(files, contents, strict=True)
    origin = "; ".join(f"{path.name}, {content.layout.name}, sha256 {sha256_of(path)}" for path, content in kinds)
    card = Card(
        name=output.stem, version=1, method=method, config=dataclasses.asdict(config), classes=class_infos,
        input=assembly.input, window=run.window, sampling=card_sampling, readout=run.readout, prompt=network.prompt,
        extra_maps=network.extra_maps,
        provenance=Provenance(recipe=f"{IMPORTED}{origin}", commit=found.upstream.source if found.upstream else ""),
    )  # fmt: skip
    card = parse_card(dump_card(card))  # checked, and equal to what will be read back
    save_checkpoint(output, card, network)
    train_only = [name for content in contents for name in content.train_only] + unused
    warnings = assembly.warnings + _losses(found, assembly, card, unused=unused, published=protocol == "published")
    return Imported(card, tuple(train_only), warnings, tuple(e for content in contents for e in content.entries))


def _read_files(method: Method, files: Sequence[Path], *, where: str) -> list[PublishedFile]:
    if method.upstream is None:
        raise BadOption(f"nothing is published for the method {method.name!r}, so nothing can be imported")
    if not files:
        raise BadOption("no file is named; one or more of the published files are wanted")
    contents = [read_published(read_torch_file(path), method, where=str(path)) for path in files]
    kinds = [content.layout.name for content in contents]
    if len(set(kinds)) < len(kinds):
        raise BadOption(f"{where} are of the kinds {'; '.join(kinds)}; one file of a kind makes a network")
    return contents


def _assemble(method: Method, contents: Sequence[PublishedFile], *, where: str) -> Assembly:
    """Let the method put the files' contents together. A tensor that it asks for in vain is missing in the files."""
    assert method.upstream
    try:
        return method.upstream.assemble({content.layout.name: content.beside | content.tensors for content in contents})
    except KeyError as error:
        theirs = published_name(str(error.args[0]), [content.layout for content in contents])
        raise BadCheckpoint(f"{where} lacks the tensor {theirs}") from None
    except IndexError:
        raise BadCheckpoint(f"{where}: a tensor has fewer axes than its layout says") from None
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{where}: {error}") from None


def _choose(assembly: Assembly, protocol: str, sampling: str | None, *, method: str) -> tuple[Any, Protocol]:
    """Choose the configuration, and the protocol to run it by."""
    runs = {
        "published": (assembly.config, assembly.published),
        "penumbra": (assembly.ours_config or assembly.config, assembly.ours),
    }
    if protocol not in runs:
        raise BadOption(f"protocol is {protocol!r}; one of {', '.join(runs)} is wanted")
    config, run = runs[protocol]
    if sampling is None:
        return config, run
    if "sampling" not in {field.name for field in dataclasses.fields(config)}:
        raise BadOption(f"sampling is {sampling!r}; {method} has no choice of samplings")
    data = dataclasses.asdict(config) | {"sampling": sampling}
    return read_strict(type(config), data, where=method, refusal=BadOption), run


def _fill(network: Network, contents: Sequence[PublishedFile], run: Protocol, *, where: str) -> list[str]:
    """Copy the files' tensors into the network; returns the files' names of those that this run does without.

    A file's own tensors go before what stands beside another's. What may stand beside and does not is zero.
    """
    state, layouts = network.state_dict(), [content.layout for content in contents]
    beside = [target for layout in layouts for target in layout.beside.values() if target in state]
    tensors: dict[str, Tensor] = {target: torch.zeros_like(state[target]) for target in beside}
    for group in [content.beside for content in contents] + [content.tensors for content in contents]:
        tensors |= group
    theirs = {name: published_name(name, layouts) for name in (*state, *tensors)}
    unused = [name for name in tensors if name.startswith(run.unused)]
    weights = {name: tensor for name, tensor in tensors.items() if name not in unused}
    fill_network(network, weights, where=where, theirs=theirs)
    return [theirs[name] for name in unused]


def _losses(
    method: Method, assembly: Assembly, card: Card, *, unused: Sequence[str], published: bool
) -> tuple[str, ...]:
    """List in sentences what this run of the files does not say although they could, and how to keep it."""
    with torch.device("meta"):  # no weights are needed to know what another run would have
        usual, ours = (method.build(config) for config in (assembly.config, assembly.ours_config or assembly.config))
    several, how = card.sampling.default_samples > 1, "import with --protocol penumbra"
    left_out = f"leaves {len(unused)} of the file's tensors out ({unused[0]}, ...)" if unused else ""
    more = ours.sampling.members or (f"{assembly.ours.default_samples} samples",)
    sentences = {
        f"the published protocol {left_out or 'answers in one pass'}, and one pass has no mutual information; {how} to "
        f"keep {' and '.join(more)}, whose disagreement it is":
            published and not several and ours.sampling.default_samples > 1,
        f"the published protocol {left_out}; {how} to keep them": published and several and bool(unused),
        "the published protocol averages logits, so mutual_information is the difference of two entropies and no "
        f"information; {how} to average probabilities": published and several and card.readout.average == "logits",
        "the published protocol takes the softmax before it resizes, so mutual_information is wrong by several times "
        f"its mean; {how} to take it after": published and several and card.readout.softmax_at == "feature",
        f"with this sampling the network takes no {usual.prompt.kind}; import without --sampling to keep them":
            card.prompt.kind == "none" != usual.prompt.kind,
        "these files make one network that answers in one pass, which has no mutual information; `penumbra ensemble` "
        "of several trainings has":
            not several and ours.sampling.default_samples == 1 and not card.prompt.members,
    }  # fmt: skip
    return tuple(sentence for sentence, is_so in sentences.items() if is_so)


def _classes(classes: tuple[ClassInfo, ...] | None, count: int) -> tuple[ClassInfo, ...]:
    if count == 1:
        raise BadCheckpoint(
            "the checkpoint has 1 class: a single channel, whose softmax is 1 everywhere; two or more are needed"
        )
    by_count = {len(table): table for table in TABLES.values()}
    if classes is None and count not in by_count:
        raise BadOption(f"the checkpoint has {count} classes, as no data set known here; name them with --classes FILE")
    chosen = by_count[count] if classes is None else classes
    if len(chosen) != count:
        raise BadOption(f"{len(chosen)} classes are named; the checkpoint has {count}")
    return chosen
