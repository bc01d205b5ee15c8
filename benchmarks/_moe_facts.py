"""What the experts of a model's mixtures are like: how evenly they are used, and how alike they are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from _moe_row import LOTS
from torch import Tensor, fx

from surgeon.contract import Observer
from surgeon.discovery import discover
from surgeon.expert_stack import ExpertStack
from surgeon.graph import Graph
from surgeon.numerics import group_at_random, group_by_kmeans, group_by_linkage, group_by_ward
from surgeon.numerics.grouping import cosines
from surgeon.observe import Routing, observe
from surgeon.samples import Sample

FACTS = {
    "most": "choices of the most used expert, as a multiple of an even share",
    "least": "of the least used expert",
    "even": "even use: exp(entropy of the choices) over the number of experts",
    "weights": "cosine of two experts' weights, mean of all pairs",
    "weights_next": "with the expert that is most alike",
    "outputs": "cosine of two experts' outputs at one token, mean of all pairs",
    "outputs_next": "with the expert that is most alike",
    "means": "cosine of two experts' mean outputs, mean of all pairs",
    "means_next": "with the expert that is most alike",
    "moved_lot": "choices whose expert is merged into a more used one, half of the experts left: groups by lot",
    "moved_ward": "the same, by Ward's linkage of mean outputs",
    "moved_linkage": "the same, by average linkage of mean outputs (HC-SMoE)",
    "moved_kmeans": "the same, by k-means of cosines of outputs (Sub-MoE)",
}
"""Titles of what :func:`facts` gives."""


def facts(graph: Graph, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """One dictionary for every mixture, keys as in ``FACTS``."""
    sites = list(discover(graph).moes())
    observers: dict[str, Observer] = {}
    for site in sites:
        part = site.part
        observers[f"{site.name}.routing"] = Routing(part.index, part.weight, None, part.experts)
        operands = [argument for argument in part.node.args[:1] if isinstance(argument, fx.Node)]
        observers[f"{site.name}.sample"] = Sample(*operands, limit=4096)
    if sites:
        observe(graph, batches, observers)
    found = []
    for site in sites:
        routing, sample = observers[f"{site.name}.routing"], observers[f"{site.name}.sample"]
        assert isinstance(routing, Routing)
        assert isinstance(sample, Sample)
        share = routing.counts / routing.counts.sum()
        stack, x = ExpertStack.of(graph, site.part), sample.values()[0]
        means = stack.mean_outputs(x)
        grams = {
            "weights": stack.weight_gram(), "outputs": stack.output_gram(x, directions=True), "means": means @ means.T,
        }  # fmt: skip
        own = {
            "most": float(share.max()) * share.numel(),
            "least": float(share.min()) * share.numel(),
            "even": float(torch.special.entr(share).sum().exp()) / share.numel(),
        }
        half, counts = len(share) // 2, routing.counts
        lots = [group_at_random(len(share), half, torch.Generator().manual_seed(seed)) for seed in LOTS]
        for name, groupings in {
            "lot": lots,
            "ward": [group_by_ward(grams["means"], counts, half)],
            "linkage": [group_by_linkage(grams["means"], half)],
            "kmeans": [group_by_kmeans(grams["outputs"], half)],
        }.items():
            own[f"moved_{name}"] = statistics.mean(_moved(share, labels) for labels in groupings)
        for name, gram in grams.items():
            alike = cosines(gram)
            others = alike[~torch.eye(len(alike), dtype=torch.bool)].reshape(len(alike), -1)
            own |= {name: float(others.mean()), f"{name}_next": float(others.max(1).values.mean())}
        found.append(own)
    return found


def _moved(share: Tensor, labels: Tensor) -> float:
    """Choices that fall on another expert of a group than its most used one; share [E], labels [E]."""
    groups = [share[labels == label] for label in labels.unique()]
    return float(sum(group.sum() - group.max() for group in groups))
