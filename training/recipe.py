"""Read a recipe, every choice of one training, strictly from YAML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from penumbra.models.card import RGB, Count, InputSpec, WindowSpec
from penumbra.models.errors import BadOption
from penumbra.models.exported import AboveZero, Positive
from penumbra.models.inputs import failures_of_input
from penumbra.models.strict import read_strict

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every choice of one training: what is trained, on what, and how long.

    config, objective: the method's network configuration and objective options.
    start: a checkpoint of a network of these shapes, whose weights the training begins with; fresh ones if left out.
    labelled_fraction: of the training frames, drawn by `seed`; the others are used without their masks.
    With 0 there are only others; labelled_batch is 0 then, and `weak_labels` are all that is learnt from.
    labelled_list: a file that names the labelled frames instead, one per line.
    leave_out: beginnings of the names of training frames that are not used at all: a drive, a city.
    void_classes: names of classes whose pixels count as unlabelled, in training and validation.
    weak_labels: what is taken from the masks of those others: `tags` of a view's classes, `boxes`, or nothing.
    labelled_batch, unlabelled_batch: views of a step, over all devices.
    crop: height and width of the views in px. scale: range of their magnification.
    jitter, strong_jitter: colour strength of labelled and of unlabelled views.
    corruptions: kinds of `corruptions.CORRUPTIONS` that half of the strong views are spoiled by; foreign objects are
    pasted into half of them then, too. None leaves them as they are; for the objective `distilled` alone.
    steps: length of the schedule, unless the caller limits the minutes. warmup: its share with rising rate.
    average_decay: of the running average of the weights, which is what is written in the end.
    input: how pixels become what the network sees. pretrained: what the EfficientNets in the network start from.
    host_rate: factor on the learning rate of those. frozen_share: of the schedule, in which their BatchNorm keeps
    the statistics that it started with; it counts, as a second `warmup` does, from when an objective begins with one.
    """

    name: str
    method: str
    config: dict[str, Any]
    data: str
    checkpoint: str
    window: WindowSpec
    crop: tuple[Positive, Positive]
    steps: Positive
    start: str = ""
    labelled_fraction: float = 0.25
    labelled_list: str = ""
    leave_out: tuple[str, ...] = ()
    void_classes: tuple[str, ...] = ()
    weak_labels: Literal["none", "tags", "boxes"] = "none"
    seed: int = 0
    scale: tuple[AboveZero, AboveZero] = (0.5, 1.5)
    jitter: float = 0.25
    strong_jitter: float = 0.5
    corruptions: tuple[str, ...] = ()
    labelled_batch: Count = 4
    unlabelled_batch: Count = 4
    learning_rate: AboveZero = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.03
    average_decay: float = 0.995
    precision: Precision = "bf16-mixed"
    input: InputSpec = field(default_factory=InputSpec)
    pretrained: Literal["none", "imagenet"] = "none"
    host_rate: float = 1.0
    frozen_share: float = 0.0
    objective: dict[str, Any] = field(default_factory=dict)
    validate_every_minutes: float = 8.0


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. One whose `base` names another file beside it has that one's fields where it has none of its own.

    Raises BadOption: no such file, not YAML, or a field that is unknown, missing or mistyped.
    """
    fields = _read_yaml(path)
    if isinstance(fields, dict) and "base" in fields:
        base = fields.pop("base")
        below = _read_yaml(path.parent / base) if isinstance(base, str) else None
        if not isinstance(below, dict):
            raise BadOption(f"{path}: base is {base!r}; the name of another recipe beside it is wanted")
        fields = {**below, **fields}
    recipe = read_strict(Recipe, fields, where=f"{path}: recipe", refusal=BadOption)
    spec = recipe.input
    failures = failures_of_input(spec) | {
        f"input reads {', '.join(spec.bands)} as {spec.dtype}; networks are trained on {', '.join(RGB)} as uint8, "
        "without low, high and clip": (spec.bands, spec.dtype, spec.low, spec.clip) != (RGB, "uint8", (), False)
    }
    for sentence in (sentence for sentence, failed in failures.items() if failed):
        raise BadOption(f"{path}: {sentence}")
    return recipe


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise BadOption(f"the recipe {path} cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise BadOption(f"the recipe {path} is not valid YAML ({' '.join(str(error).split())})") from None
