"""Training of the CPS branches: which objective a recipe asks for, a file each in `penumbra.models.cps.objectives`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from penumbra.models.card import read_strict
from penumbra.models.cps.net import CpsNetwork
from penumbra.models.cps.objectives.cross_probability import CrossProbabilityObjective, CrossProbabilityOptions
from penumbra.models.cps.objectives.cross_pseudo import CpsObjective, CpsOptions, PlainCpsObjective
from penumbra.models.cps.objectives.mean_teacher import MeanTeacherObjective, MeanTeacherOptions
from penumbra.models.cps.objectives.pseudo import PseudoObjective
from penumbra.models.cps.objectives.pseudoseg import PseudoSegObjective, PseudoSegOptions
from penumbra.models.cps.objectives.semi_supervised import Ramped
from penumbra.models.cps.objectives.supervised import SupervisedObjective, SupervisedOptions
from penumbra.models.errors import BadOption


class Kind(NamedTuple):
    """One objective: how it is built, its options, and the numbers of branches that it can train."""

    build: Callable[..., nn.Module]
    options: type
    branches: tuple[int, ...]


KINDS = {
    "cps": Kind(CpsObjective, CpsOptions, (2,)),
    "cps_plain": Kind(PlainCpsObjective, CpsOptions, (2,)),
    "supervised": Kind(SupervisedObjective, SupervisedOptions, (1, 2)),
    "cross_probability": Kind(CrossProbabilityObjective, CrossProbabilityOptions, (2,)),
    "mean_teacher": Kind(MeanTeacherObjective, MeanTeacherOptions, (2,)),
    "pseudo": Kind(PseudoObjective, Ramped, (1,)),
    "pseudoseg": Kind(PseudoSegObjective, PseudoSegOptions, (1,)),
}


def build_objective(network: CpsNetwork, average: CpsNetwork, options: Mapping[str, Any]) -> nn.Module:
    """The objective that `kind` names (else `cps`), with the recipe's other options.

    Raises BadOption: an unknown kind, or branches that it cannot train; BadArtifact naming an unknown or mistyped
    option.
    """
    rest = dict(options)
    name, num_branches = str(rest.pop("kind", "cps")), len(network.names)
    if name not in KINDS:
        raise BadOption(f"recipe.objective.kind is {name!r}; one of {', '.join(KINDS)} is wanted")
    kind = KINDS[name]
    if num_branches not in kind.branches:
        wanted = " or ".join(map(str, kind.branches))
        raise BadOption(f"recipe.config.branches is {num_branches}; the objective {name!r} trains {wanted}")
    return kind.build(network, average, read_strict(kind.options, rest, where="recipe.objective"))
