"""A model's card in the forms of others: a README for Hugging Face, a STAC item with MLM, a package of bioimage.io."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penumbra.export.bioimageio import PACKAGE, write_package
from penumbra.models.card import Card
from penumbra.models.errors import BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.store import Artifact
from penumbra.serving.render.stac import item, model_assets, model_properties

LICENCES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
            "cc-by-nc-sa-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "unlicense")  # fmt: skip
"""Those that Hugging Face, and in their spelling SPDX, have a name for; any other licence is told in its own words."""
USE = """## Use

```bash
pip install penumbra-serving
penumbra predict picture.jpg -m {name} --store store
```
"""


def huggingface(artifact: Artifact) -> str:
    """Write a README.md whose head has the metadata of a model card (https://huggingface.co/docs/hub/model-cards)."""
    card = artifact.card
    licence = card.provenance.licence
    known = licence.lower() in LICENCES
    head: dict[str, Any] = {
        "license": licence.lower() if known else "other",
        "library_name": "penumbra",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "uncertainty", card.method],
    } | ({} if known or not licence else {"license_name": re.sub(r"[^a-z0-9.-]+", "-", licence.lower()).strip("-")})
    if card.provenance.metrics:
        head["model-index"] = [{"name": card.name, "results": [{
            "task": {"type": "image-segmentation"},
            "dataset": {"name": card.provenance.data or "not named", "type": "image-segmentation"},
            "metrics": [{"type": name, "value": value} for name, value in card.provenance.metrics.items()],
        }]}]  # fmt: skip
    yaml = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items())  # JSON is YAML
    return f"---\n{yaml}\n---\n\n{readme(card)}"


def readme(card: Card) -> str:
    """Write the facts of a card as Markdown."""
    figures = "\n".join(f"| {name} | {value:g} |" for name, value in card.provenance.metrics.items())
    spec, sampling = card.input, card.sampling
    facts = {
        "method": card.method, "classes": ", ".join(one.name for one in card.classes),
        "input": f"{', '.join(spec.bands)}, {spec.dtype}",
        "window": f"{card.window.width}x{card.window.height}" if card.window.height else "the whole picture",
        "samples": f"{sampling.default_samples} ({sampling.kind})",
        "maps": ", ".join(card.maps(card.num_members(sampling.default_samples))),
        "data": card.provenance.data, "licence": card.provenance.licence,
        "recipe": " at ".join(filter(None, (card.provenance.recipe, card.provenance.commit))),
        "calibrated on": card.calibration.data if card.calibration else "",
    }  # fmt: skip
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items() if fact)
    measured = f"| figure | value |\n|---|---|\n{figures}" if figures else "No figures are recorded."
    return (
        f"# {card.name}\n\nSemantic segmentation that says, per pixel, how sure it is: version {card.version} for "
        f"Penumbra.\n\n| | |\n|---|---|\n{rows}\n\n## Validation\n\n{measured}\n\n{USE.format(name=card.name)}"
    )


def stac(artifact: Artifact) -> str:
    """Write a STAC item of the model, with its graphs as assets beside it."""
    card = artifact.card
    about = {"license": card.provenance.licence if card.provenance.licence.lower() in LICENCES else "other"}
    found = item(f"{card.name}-{card.version}", model_properties(card) | about, model_assets(card, "."))
    return json.dumps(found, allow_nan=False, indent=1) + "\n"


FORMS: dict[str, tuple[str, Callable[[Artifact], str]]] = {
    "huggingface": ("README.md", huggingface), "stac": ("item.json", stac),
}  # fmt: skip
"""Forms of one text: the name of its file, and what writes it."""


def write_card(artifact: Artifact, kind: str, output: Path | None) -> str:
    """Write a card of a kind into a folder, or return its text where none is named.

    Raises BadOption where a file of that name is there, where bioimageio, a package of files, has no folder, and where
    the model cannot be one.
    """
    if output is not None:
        names = (FORMS[kind][0],) if kind in FORMS else PACKAGE
        if taken := next((output / name for name in names if os.path.lexists(output / name)), None):
            raise BadOption(f"{taken} is in the way; move it, or name another directory")
        output.mkdir(parents=True, exist_ok=True)
    if kind in FORMS:
        name, write = FORMS[kind]
        text = write(artifact)
        if output is None:
            return text
        write_whole(output / name, text.encode())
        return f"{output / name}\n"
    if output is None:
        raise BadOption("a package of bioimage.io is several files; add -o DIRECTORY")
    return f"{write_package(artifact, readme(artifact.card), output)}\n"
