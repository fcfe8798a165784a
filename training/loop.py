"""Train a recipe on a data folder to a checkpoint, resumably. The loop knows objectives, not methods."""

import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from penumbra.models import find_method
from penumbra.models.card import Card, Provenance, Readout, dump_card, parse_card
from penumbra.models.checkpoint import (
    COUNTER,
    check_replaceable,
    fill_network,
    load_checkpoint,
    read_card,
    save_checkpoint,
)
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption, ModelFault
from penumbra.models.files import write_whole
from penumbra.models.strict import read_strict
from penumbra.serving.engine.allocator import keep_freed_memory
from penumbra.serving.process import build_facts
from penumbra.training.batches import Batches, choose_split
from penumbra.training.data import DataSet, find_data, find_left_out, has_no_class, has_no_frames, load_training
from penumbra.training.devices import follow_first, gather, share_of, start_devices
from penumbra.training.evaluate import measure
from penumbra.training.frames import FrameSet, write_split
from penumbra.training.hosts import IMAGENET_LICENCE, find_hosts, load_imagenet, parameter_groups
from penumbra.training.objective import Finishing, Staged, build_objective, update_average
from penumbra.training.recipe import Recipe

MAX_GRADIENT_NORM = 5.0
"""As in NP-SemiSeg's released training; it only matters in the first steps."""

REPORT_EVERY_STEPS = 50

SEED_STRIDE = 1_000_003
"""Between the seeds of two processes: farther apart than the seeds that people choose."""

SHARED = ("network.", "average.")
"""What of an objective's state is the same in every process."""

Report = Callable[[float, str], None]
"""Called with the share that is done and a line about it."""


class Training:
    """The state of one run: objective, optimiser, stream of batches, step and seconds so far. One thread only.

    Of several processes each has one, with its own random stream and its share of the batches.
    """

    def __init__(self, recipe: Recipe, train: FrameSet, num_classes: int, *, fabric: Fabric | None = None) -> None:
        self.fabric = fabric or start_devices(precision=recipe.precision)
        self.recipe, self.step, self.elapsed_s = recipe, 0, 0.0
        self.generator = torch.Generator().manual_seed(recipe.seed + SEED_STRIDE * self.fabric.global_rank)
        self.split = choose_split(train, recipe)
        sizes = ("labelled_batch", "unlabelled_batch")
        share = {name: share_of(self.fabric, getattr(recipe, name), name=name) for name in sizes}
        own = dataclasses.replace(recipe, **share)
        self.batches = Batches(train, self.split, own, self.generator, num_classes=num_classes)
        network = build_network(recipe, num_classes).to(memory_format=torch.channels_last)
        average = copy.deepcopy(network).requires_grad_(False).eval()
        self.objective = build_objective(recipe.method, network, average, recipe.objective)
        if isinstance(self.objective, Finishing) and not len(self.split[0]):
            raise BadOption("the objective is fitted to labelled frames in the end, and there are none; label some")
        hosts, staged = find_hosts(network), self.objective if isinstance(self.objective, Staged) else None
        self.begins = {host: staged.begin_of(host) if staged else 0.0 for host in hosts}
        if not hosts and (recipe.host_rate, recipe.frozen_share) != (1.0, 0.0):
            raise BadOption("host_rate and frozen_share are of an EfficientNet, which is not there; leave them out")
        optimizer = torch.optim.AdamW(parameter_groups(network, hosts, recipe), lr=recipe.learning_rate)
        self.forward, self.optimizer = self.fabric.setup(self.objective, optimizer)

    @property
    def average(self) -> Network:
        """The running average of the weights: what is measured and written."""
        return self.objective.average

    def advance(self, progress: float) -> dict[str, float]:
        """Take one step at the learning rate of `progress`; returns the named losses.

        Raises ModelFault where the gradients are not finite. In 16-mixed a step whose gradients alone overflow is left
        out, and the next ones are scaled less.
        """
        begun = max((begin for begin in self.begins.values() if begin <= progress), default=0.0)
        rate = self.recipe.learning_rate * schedule(progress, warmup=self.recipe.warmup, begin=begun)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)  # a state that is older has none
        for host, begin in self.begins.items():
            host.frozen = progress < begin + self.recipe.frozen_share
        self.objective.train()
        self.average.eval()
        try:
            losses = self.forward(self.fabric.to_device(self.batches.draw()), progress, self.generator)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise BadOption("one view by itself has no statistics; batches of two or more are wanted") from None
        self.fabric.backward(losses["total"])
        norm: Any = self.fabric.clip_gradients(
            self.forward, self.optimizer, max_norm=MAX_GRADIENT_NORM, error_if_nonfinite=False
        )
        figures = {name: float(value.detach()) for name, value in losses.items()}
        if not (norm.isfinite() or (self.recipe.precision == "16-mixed" and math.isfinite(figures["total"]))):
            raise ModelFault(
                f"the training diverged in step {self.step + 1} ({brief(figures)}), and its gradients are not finite; "
                f"a learning_rate below {self.recipe.learning_rate:g} is wanted"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        follow_first(self.fabric, self.objective.network)
        # The average of the first steps must not remember the random start.
        decay = min(1 - 1 / (self.step + 1), self.recipe.average_decay)
        update_average(self.average, self.objective.network, decay=decay)
        follow_first(self.fabric, self.average)
        return figures

    def finish(self) -> None:
        """Let an objective that has something to fit in the end do so, from the labelled frames."""
        if isinstance(self.objective, Finishing):
            self.objective.eval().finish(map(self.fabric.to_device, self.batches.labelled_frames()))

    def progress(self, minutes: float | None) -> float:
        """Return the share of the schedule that is over: of the minutes, where given, else of the recipe's steps."""
        return self.elapsed_s / (60 * minutes) if minutes else self.step / self.recipe.steps

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs; the old file stays until the new one is whole. For all processes."""
        objective = self.objective.state_dict()
        own = {name: value for name, value in objective.items() if not name.startswith(SHARED)}
        own_states = gather(self.fabric, {"objective": own, "generator": self.generator.get_state()})
        if not self.fabric.is_global_zero:
            return
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "objective": {name: value for name, value in objective.items() if name not in own},
            "processes": own_states,
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Go on where `save` was called. Raises BadOption if the file is of another recipe."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            begun_with = Recipe(**state["recipe"])  # fields that are younger than the state have their defaults
            processes, objective, optimizer = state["processes"], state["objective"], state["optimizer"]
            step, elapsed_s = state["step"], state["elapsed_s"]
        except (UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, IndexError):
            raise BadOption(f"{path} is in the way, and is no state of a training; move it away") from None
        if dataclasses.asdict(begun_with) != dataclasses.asdict(self.recipe):
            raise BadOption(f"{path} was begun with another recipe; remove it to start anew")
        if (begun_on := len(processes)) != self.fabric.world_size:
            raise BadOption(f"{path} was begun on {begun_on} devices, not {self.fabric.world_size}; go on with as many")
        own = processes[self.fabric.global_rank]
        try:
            self.objective.load_state_dict(objective | own["objective"])
        except RuntimeError:  # the classes of the data are no field of the recipe
            raise BadOption(
                f"{path} was begun with other classes or another network; remove it to start anew"
            ) from None
        self.optimizer.load_state_dict(optimizer)
        if scaler := state.get("precision"):  # a state that is older has none
            self.fabric.strategy.precision.load_state_dict(scaler)
        self.generator.set_state(own["generator"])
        self.step, self.elapsed_s = step, elapsed_s


def train(
    recipe: Recipe, data_dir: Path, *, runs_dir: Path = Path("runs"), threads: int | None = None,
    minutes: float | None = None, fabric: Fabric | None = None, report: Report = lambda share, line: None,
) -> Path:  # fmt: skip
    """Train, or go on after an interruption, and return the path of the final checkpoint.

    threads: per process. minutes: length of the schedule by the clock, instead of the recipe's steps. fabric: of
    `start_devices`; one device if left out. Process 0 alone validates and writes. Raises BadOption, BadData.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    data = find_data(recipe.data, data_dir)
    frames, val = load_training(data, data_dir, void_classes=recipe.void_classes)
    run_dir, path = runs_dir / recipe.name, Path(recipe.checkpoint)
    for folder in (run_dir, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in (path, run_dir / "latest.safetensors"):
        check_replaceable(checkpoint, made_by=recipe_of(recipe))
    training = Training(recipe, frames, len(data.classes), fabric=fabric)
    if begun := (run_dir / "state.ckpt").exists():
        training.resume(run_dir / "state.ckpt")
    if training.fabric.is_global_zero:
        is_over = not begun and (run_dir / "latest.safetensors").exists()
        write_split(run_dir / "labelled.txt", frames, training.split[0], replace=is_over)
    labelled, used = training.split[0], torch.cat(training.split).unique()
    card = card_of(recipe, data, num_frames=len(used), num_labelled=len(labelled), network=training.average)
    run(training, card, val, run_dir, minutes=minutes, report=report)
    training.finish()
    if training.fabric.is_global_zero:
        report(1.0, f"wrote {path}: {brief(write_measured(path, card, training.average, val))}")
        (run_dir / "state.ckpt").unlink(missing_ok=True)
    training.fabric.barrier()
    return path


def run(training: Training, card: Card, val: FrameSet, run_dir: Path, *, minutes: float | None, report: Report) -> None:
    """Advance until the schedule is over; save and validate every few minutes, which count as no time."""
    recipe = training.recipe
    next_save_s = training.elapsed_s + 60 * recipe.validate_every_minutes
    while (progress := training.progress(minutes)) < 1:
        started = time.perf_counter()
        losses = training.advance(progress)
        # Process 0's clock is everyone's, or some would stop before the others.
        training.elapsed_s = training.fabric.broadcast(training.elapsed_s + time.perf_counter() - started)
        if training.step % REPORT_EVERY_STEPS == 0:
            report(progress, f"step {training.step}, {training.elapsed_s:.0f} s: {brief(losses)}")
        if training.elapsed_s >= next_save_s:
            next_save_s = training.elapsed_s + 60 * recipe.validate_every_minutes
            training.save(run_dir / "state.ckpt")
            if training.fabric.is_global_zero:
                figures = write_measured(run_dir / "latest.safetensors", card, training.average, val, every=4)
                report(progress, f"validation on every 4th frame: {brief(figures)}")
    training.save(run_dir / "state.ckpt")


def schedule(progress: float, *, warmup: float, begin: float = 0.0) -> float:
    """Return the factor on the learning rate: a linear rise, then a cosine to 0, which rises anew from `begin`."""
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) if progress >= warmup else 1.0
    return cosine * min(1.0, (progress - begin + 1e-3) / (warmup + 1e-3))


def build_network(recipe: Recipe, num_classes: int) -> Network:
    """Build the recipe's network with fresh weights from its seed, or those of its `start`.

    Convolutions as in He et al. 2015: torch's default is too small to train a deep net from scratch. The global
    generator is left as it was. Raises BadOption (a configuration that cannot be), BadCheckpoint.
    """
    method, fields = find_method(recipe.method), {"num_classes": num_classes, **recipe.config}
    config: Any = read_strict(method.config, fields, where="recipe.config", refusal=BadOption)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = method.build(config)
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if recipe.pretrained == "imagenet":
            load_imagenet(network, recipe)
    if recipe.start:
        state = load_checkpoint(Path(recipe.start))[1].state_dict()
        fill_network(network, {k: v for k, v in state.items() if not k.endswith(COUNTER)}, where=recipe.start)
    return network


def card_of(recipe: Recipe, data: DataSet, *, num_frames: int, num_labelled: int, network: Network) -> Card:
    """Make the card of the recipe's checkpoint, without figures. Raises BadArtifact: nothing could read it."""
    method = find_method(recipe.method)
    config: Any = read_strict(method.config, {"num_classes": len(data.classes), **recipe.config}, where="recipe.config")
    drawn = recipe.labelled_list or f"{recipe.labelled_fraction:g}, seed {recipe.seed}"
    rest = {"none": "unlabelled", "tags": "with tags of their crops", "boxes": "with boxes"}[recipe.weak_labels]
    without = " and ".join((*recipe.leave_out, *recipe.void_classes))
    part = f"train without {without}" if without else "train"
    sentence = f"{data.title} {part}, {num_labelled} of {num_frames} frames labelled ({drawn}), the rest {rest}"
    if recipe.corruptions:
        sentence += f"; views spoiled by {', '.join(recipe.corruptions)} and pasted objects"
    licences = [data.licence + (IMAGENET_LICENCE if recipe.pretrained == "imagenet" else "")]
    for source in read_sources(recipe, data):
        sentence += f"; with {source.name}: {source.provenance.data}"
        licences.append(source.provenance.licence)
    licence = "; ".join(dict.fromkeys(filter(None, licences)))
    card = Card(
        name=recipe.name, version=1, method=recipe.method, config=dataclasses.asdict(config), classes=data.classes,
        input=recipe.input, window=recipe.window, sampling=network.sampling, readout=Readout(align_corners=True),
        prompt=network.prompt, extra_maps=network.extra_maps,
        provenance=Provenance(sentence, licence, recipe_of(recipe), build_facts("").get("commit", "")),
    )  # fmt: skip
    return parse_card(dump_card(card))


def read_sources(recipe: Recipe, data: DataSet) -> list[Card]:
    """Read the cards of the checkpoints that a training begins with or learns from. Raises BadCheckpoint, and BadOption
    where one has seen what the recipe leaves out, or does not tell of its training on this data."""
    options, cards = recipe.objective, list[Card]()
    for path in filter(None, (recipe.start, options.get("host"), options.get("maps"), *options.get("teachers", ()))):
        card = read_card(Path(path))
        trainings = find_left_out(card, data) or [""]
        seen = [name for name in recipe.leave_out if not all(has_no_frames(out, name, data) for out in trainings)]
        seen += [name for name in recipe.void_classes if not all(has_no_class(out, name) for out in trainings)]
        if seen:
            raise BadOption(
                f"{path} was trained on {card.provenance.data!r}, and the recipe leaves {seen[0]} out; one that has "
                "not seen it is wanted"
            )
        cards.append(card)
    return cards


def recipe_of(recipe: Recipe) -> str:
    """Return what a checkpoint's card says of where it comes from."""
    return f"training/recipes/{recipe.name}.yaml"


def write_measured(path: Path, card: Card, network: Network, val: FrameSet, *, every: int = 1) -> dict[str, float]:
    """Write the checkpoint in fp16, measure what can be read back, and write it again with the figures."""
    save_checkpoint(path, card, network, half=True)
    _, stored = load_checkpoint(path)
    stored = stored.to(next(network.parameters()).device, memory_format=torch.channels_last)
    figures = measure(stored, val, card=card, every=every)
    split = "val/seg" if every == 1 else f"val[::{every}]/seg"
    metrics = {f"{split}/{name}": round(value, 5) for name, value in figures.items() if math.isfinite(value)}
    provenance = dataclasses.replace(card.provenance, metrics=metrics)
    save_checkpoint(path, dataclasses.replace(card, provenance=provenance), stored, half=True)
    return figures


def brief(figures: dict[str, float]) -> str:
    """Put figures in one line, per-class ones left out."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if "/" not in name)
