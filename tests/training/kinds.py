"""Every kind of objective of the CPS family and the MC-dropout baseline, tiny, on the procedural shapes."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penumbra.models.contract import Views
from penumbra.models.cps.objective import KINDS
from penumbra.training.data import find_data
from penumbra.training.loop import Training, build_network
from penumbra.training.objective import build_objective
from penumbra.training.recipe import Recipe
from tests.training import tiny

SINGLE = ("supervised", "pseudo", "pseudoseg")
VARIANTS: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS} | {"cross_probability-kl": {"distance": "kl"}}
RUNS = (*VARIANTS, "dropout")


def recipe_of(name: str, folder: Path = Path(), *, steps: int = 8) -> Recipe:
    """A tiny recipe of one kind of objective, that uses unlabelled views from the start."""
    kind = name.partition("-")[0]
    begin = {} if kind == "supervised" else {"start": 0.0, "full": 0.1}
    if kind == "dropout":
        recipe = tiny.recipe("np_semiseg", folder, steps=steps)
        config, options = {"sampling": "dropout", "dropout": 0.25}, {"confidence": 0.4}
    else:
        recipe = tiny.recipe("cps", folder, steps=steps)
        config, options = {"branches": 1 if kind in SINGLE else 2}, VARIANTS[name]
    return dataclasses.replace(
        recipe, name=f"{name}-shapes", config=recipe.config | config, objective={"kind": kind} | begin | options
    )


def objective_of(name: str, **options: Any) -> Any:
    recipe = recipe_of(name)
    network = build_network(recipe, 3)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    objective = build_objective(recipe.method, network, average, recipe.objective | options).train()
    objective.average.eval()
    return objective


def losses_of(name: str, batch: Views, progress: float = 1.0, **options: Any) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = objective_of(name, **options)(batch, progress, torch.Generator().manual_seed(0))
    return losses


def training_of(name: str, folder: Path) -> Training:
    data = find_data("shapes")
    return Training(recipe_of(name, folder), data.load(folder, "train"), len(data.classes))
