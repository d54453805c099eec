"""Gradients and sketches of four sites with a real encoder: the work that `calibration.py` measures and compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from _medical import RECIPE, medical
from torch.nn.utils.rnn import pad_sequence

from client.alone import site_at
from client.trainer import LocalTrainer
from giva_core import aggregate, bases, calibration, protocol
from giva_core.calibration import Sketches
from giva_core.config import GivaConfig, RunConfig
from giva_core.models import TaskModel
from giva_core.protocol import TrainRequest
from giva_core.sites import site_folders
from giva_core.sketch import SketchPass, sketch_pass
from giva_core.types import Arrays, LayerShape

HEAD_ROUNDS, HEAD_STEPS = 3, 20

Batches = Sequence[dict[str, torch.Tensor]]
Gradients = dict[str, torch.Tensor]


def make_sites(seed: int) -> list[LocalTrainer]:
    """The four sites of the medical task, with one model, on the CPU: dense gradients, clock and memory are its."""
    settings = {"data.folder": str(medical(seed).sites), "giva.seed": seed, "train.max-local-steps": HEAD_STEPS}
    config = RunConfig.from_toml(RECIPE, {**settings, "train.device": "cpu"})
    return [LocalTrainer(site_at(folder, config), config) for folder in site_folders(config.data)]


def train_head(sites: Sequence[LocalTrainer]) -> Arrays:
    """A few federated rounds of the head alone: with a zero head no gradient would reach the encoder."""
    arrays = sites[0].initial_state()
    for number in range(1, HEAD_ROUNDS + 1):
        names = protocol.trained_names(sites[0].schema, "head", "")
        request = TrainRequest(arrays, number, HEAD_ROUNDS, "", names, is_head_round=True)
        updates = [site.train(request) for site in sites]
        arrays = aggregate.weighted_mean([u.arrays for u in updates], [u.num_examples for u in updates])
    return arrays


def summed_loss(task: TaskModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the batch's losses."""
    return task.task_loss(task.forward(batch), batch["labels"], reduction="sum")


def sketch(
    task: TaskModel, layers: Sequence[LayerShape], multipliers: Arrays, side: str, batches: Batches
) -> SketchPass:
    """One pass over the batches, by hooks."""

    def loss_fn(_: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return summed_loss(task, batch), len(batch["labels"])

    return sketch_pass(task.model, layers, multipliers, side, batches, loss_fn)


def weight_gradients(task: TaskModel, layers: Sequence[LayerShape], batches: Batches) -> Gradients:
    """The summed gradient of every layer's weight, dense, by autograd."""
    weights = [task.model.get_parameter(f"{layer.name}.weight") for layer in layers]
    task.model.eval().requires_grad_(False)
    total = {layer.name: torch.zeros(layer.d_out, layer.d_in) for layer in layers}
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        for layer, gradient in zip(layers, torch.autograd.grad(summed_loss(task, batch), weights), strict=True):
            total[layer.name] += gradient
    task.model.requires_grad_(False)
    return total


def lowrank_rows(gradient: torch.Tensor, r: int) -> torch.Tensor:
    """The top-r right singular vectors by `torch.svd_lowrank(G, q=4r, niter=4)`, `(r, d_in)`."""
    return torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)[2][:, :r].T


def energy(gradient: torch.Tensor, rows: torch.Tensor) -> float:
    """‖G Aᵀ‖² / ‖G‖² in float64."""
    G = gradient.double()
    return float((G @ rows.double().T).square().sum() / G.square().sum())


def exact_rows(gradient: torch.Tensor, r: int) -> torch.Tensor:
    """The top-r right singular vectors `(r, d_in)`, in float64."""
    return torch.linalg.svd(gradient.double(), full_matrices=False)[2][:r]


def forward_backward(task: TaskModel, first: LayerShape, batches: Batches) -> None:
    """What every gradient costs at least: forward, and backward through the frozen model to the first layer."""
    task.model.eval().requires_grad_(False)
    handle = task.model.get_submodule(first.name).register_forward_hook(lambda *call: call[2].requires_grad_(True))
    for batch in batches:
        summed_loss(task, batch).backward()
    handle.remove()


def federated_sketches(
    task: TaskModel, layers: Sequence[LayerShape], ranks: Sequence[int], giva: GivaConfig, sites: Sequence[Batches]
) -> Iterator[tuple[Sketches, int]]:
    """The aggregate after 0, 1, 2 ... power passes, and the bytes that a site has sent until then."""
    previous: Sketches | None = None
    sent = 0
    names = [layer.name for layer in layers]
    for stage in calibration.stages(giva):
        multipliers = calibration.multipliers(stage, layers, ranks, giva, previous)
        found = [sketch(task, layers, multipliers, stage.side, batches) for batches in sites]
        coded = [{n: bases.quantise(a, giva.sketch_bits) for n, a in each.arrays.items()} for each in found]
        weights = [each.num_examples for each in found]
        sent += sum(array.nbytes for array in protocol.pack_sketches(coded[0], names).values())
        previous = {n: bases.mean_sketch([each[n] for each in coded], weights, giva.sketch_bits) for n in names}
        if stage.side == "output":
            yield previous, sent


def rebatched(batches: Batches, size: int) -> Batches:
    """The same examples in other batches, of one length as far as may be."""
    rows = []
    for batch in batches:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            rows.append({name: tensor[i, :length] if tensor.ndim == 2 else tensor[i] for name, tensor in batch.items()})
    rows.sort(key=lambda row: len(row["input_ids"]))

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(tensors, batch_first=True) if tensors[0].ndim else torch.stack(tensors)

    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [{name: join([row[name] for row in group]) for name in group[0]} for group in groups]
