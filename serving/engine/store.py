"""Artifacts on disk: `store/<name>/<version>/` with card.json, the graphs and a golden window.

Opening one checks everything that can be checked without running it; the golden window is run at load.
"""

import hashlib
import os
import re
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from penumbra.models.card import Card, dump_card, parse_card
from penumbra.models.errors import BadArtifact, UnknownModel
from penumbra.models.files import whole_directory, write_whole
from penumbra.serving.engine.signature import PublicKeys, check_signature

if TYPE_CHECKING:  # torch is imported where tensors are read: looking into a store is instant
    from torch import Tensor

CARD = "card.json"
GOLDEN = "golden.safetensors"
PROMOTED = "promoted"
"""The file beside a model's versions with the number of the one that is served where versions are promoted."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the checkpoint's network answered to the golden windows: logits_SBKhw from noise_SBL."""

    noise_SBL: "Tensor"
    logits_SBKhw: "Tensor"


@dataclass(frozen=True, slots=True)
class Golden:
    """Recorded calls on the same windows image_B3hw (normalised): one without, and if the model takes one, one with
    a prompt. extras_BEhw: the network's own maps, where it has any.
    """

    image_B3hw: "Tensor"
    plain: Recorded
    prompt: "tuple[Tensor, ...]" = ()
    prompted: Recorded | None = None
    extras_BEhw: "Tensor | None" = None


def golden_tensors(golden: Golden) -> "dict[str, Tensor]":
    """Name the tensors of recorded calls as they are stored."""
    tensors = {"image_B3hw": golden.image_B3hw}
    for prefix, answer in (("", golden.plain), ("prompted.", golden.prompted)):
        if answer:
            tensors |= {f"{prefix}noise_SBL": answer.noise_SBL, f"{prefix}logits_SBKhw": answer.logits_SBKhw}
    tensors |= {f"prompt.{i}": tensor for i, tensor in enumerate(golden.prompt)}
    if golden.extras_BEhw is not None:
        tensors["extras_BEhw"] = golden.extras_BEhw
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported model whose files are the ones its card names."""

    directory: Path
    card: Card
    golden: Golden
    card_bytes: bytes
    """The card as it was read; what is signed."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_card(directory: Path) -> Card:
    """Read the card of an artifact, a directory store/<name>/<version>; its files are not looked at.

    Raises BadArtifact: a card that does not read, belongs elsewhere, or names no exported files.
    """
    return _parse(directory, _read_card(directory))


def _read_card(directory: Path) -> bytes:
    try:
        return (directory / CARD).read_bytes()
    except OSError:
        raise BadArtifact(f"{directory} has no readable {CARD}; export the checkpoint again") from None


def _parse(directory: Path, card_bytes: bytes) -> Card:
    try:
        card = parse_card(card_bytes.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadArtifact(f"{directory} has no readable {CARD}; export the checkpoint again") from None
    except BadArtifact as error:
        raise BadArtifact(f"{directory}: {error}") from None
    if directory.parts[-2:] != (card.name, str(card.version)):
        raise BadArtifact(f"{directory} holds {card.name} version {card.version}; its directories must be named so")
    if card.export is None or GOLDEN not in card.export.files:
        raise BadArtifact(f"{directory}: the card names no exported files; export the checkpoint again")
    return card


def open_artifact(directory: Path, *, trusted_keys: PublicKeys | None = None) -> Artifact:
    """Read and check an artifact; with `trusted_keys`, first of all that one of them has signed it.

    Raises BadArtifact as `artifact_card` and `check_signature`, or a missing file, or a wrong hash.
    """
    card_bytes = _read_card(directory)  # once: what is signed is what is parsed
    if trusted_keys is not None:
        check_signature(directory, card_bytes, trusted_keys)
    card = _parse(directory, card_bytes)
    assert card.export
    for name, expected in card.export.files.items():
        path = directory / name
        try:
            found = sha256_of(path) if Path(name).name == name and stat.S_ISREG(path.stat().st_mode) else ""
        except FileNotFoundError:
            found = ""
        except OSError as error:
            raise BadArtifact(f"{path} cannot be read ({error.strerror}); let this server's user read it") from None
        if not found:
            raise BadArtifact(f"{directory} lacks the file {name} that its card names; export the checkpoint again")
        if found != expected:
            raise BadArtifact(f"{path} was changed after its export (sha256 differs from the card); export it again")
    return Artifact(directory, card, _read_golden(directory / GOLDEN), card_bytes)


def _read_golden(path: Path) -> Golden:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        prompt = tuple(tensors[name] for name in sorted(tensors) if name.startswith("prompt."))
        prompted = _answer(tensors, "prompted.") if prompt else None
        return Golden(tensors["image_B3hw"], _answer(tensors, ""), prompt, prompted, tensors.get("extras_BEhw"))
    except (SafetensorError, KeyError, OSError):
        raise BadArtifact(f"{path} does not hold a golden window; export the checkpoint again") from None


def _answer(tensors: "dict[str, Tensor]", prefix: str) -> Recorded:
    return Recorded(tensors[f"{prefix}noise_SBL"], tensors[f"{prefix}logits_SBKhw"])


def versions(store: Path) -> dict[str, list[int]]:
    """List the names in the store with their versions in ascending order. An absent store is empty."""
    if not store.is_dir():
        return {}
    found: dict[str, list[int]] = {}
    for card in store.glob(f"*/*/{CARD}"):
        if re.fullmatch("[1-9][0-9]*", card.parent.name) and card.parent.parent.name.isprintable():
            found.setdefault(card.parent.parent.name, []).append(int(card.parent.name))
    return {name: sorted(numbers) for name, numbers in sorted(found.items())}


def next_version(store: Path, name: str) -> int:
    """Number a model's next artifact: above all that are there, also those that hold no card."""
    taken = [int(path.name) for path in (store / name).glob("*") if re.fullmatch("[1-9][0-9]*", path.name)]
    return max(taken, default=0) + 1


def find_promoted(store: Path, name: str) -> Path:
    """Find the version of a model that was promoted last, and promote the newest where none ever was.

    One that has gone leaves its place to the newest before it. Raises UnknownModel, and BadArtifact where there is none
    before it, the number cannot be read, or the store cannot be written and has to be.
    """
    newest, mark = find_artifact(store, name), store / name / PROMOTED
    try:
        promoted = int(mark.read_text("ascii"))
    except FileNotFoundError:
        promote(newest)
        return newest
    except (OSError, ValueError):
        raise BadArtifact(f"{mark} cannot be read as a number; write the version to serve into it") from None
    numbers = versions(store).get(name, [])
    if not (left := [number for number in numbers if number <= promoted]):
        there = ", ".join(map(str, numbers))
        raise BadArtifact(f"{mark} names version {promoted}, which has gone; write one that is there into it: {there}")
    return newest.with_name(str(left[-1]))


def promote(directory: Path) -> None:
    """Make an artifact the version of its model that is served. Raises BadArtifact where that cannot be written."""
    mark = directory.parent / PROMOTED
    try:
        write_whole(mark, f"{directory.name}\n".encode())
        mark.chmod(0o644)
    except OSError as error:
        raise BadArtifact(
            f"{mark} cannot be written ({error.strerror}); write {directory.name} into it from where the store can be"
        ) from None


def write_version(source: Path, target: Path, card: Card) -> None:
    """Write an artifact beside another one: the same files, hard-linked where possible, under another card."""
    parse_card(dump_card(card))
    assert card.export
    with whole_directory(target) as draft:
        for name in card.export.files:
            try:
                os.link(source / name, draft / name)
            except OSError:  # a file system without hard links
                shutil.copy2(source / name, draft / name)
        (draft / CARD).write_text(dump_card(card), "utf-8")
        (draft / CARD).chmod(0o644)


def put_version(draft: Path, store: Path, card: Card) -> Path:
    """Make a draft in a store the next version of its model, for everyone to read, under its card. Raises OSError."""
    card = replace(card, version=next_version(store, card.name))
    (draft / CARD).write_text(dump_card(card), "utf-8")
    for path in (*draft.iterdir(), draft):
        path.chmod(0o755 if path.is_dir() else 0o644)  # temporary files are private; servers have other users
    return draft.rename(store / card.name / str(card.version))


def find_artifact(store: Path, name: str, version: int | None = None) -> Path:
    """Find a model's directory, its newest version unless one is named. Raises UnknownModel naming what there is."""
    known = versions(store)
    if name not in known:
        raise UnknownModel(f"there is no model {name[:60]!r} in {store}; there are {', '.join(known) or 'none'}")
    if version is not None and version not in known[name]:
        there = ", ".join(map(str, known[name]))
        raise UnknownModel(f"{name} has no version {version}; it has {there}")
    return store / name / str(known[name][-1] if version is None else version)
