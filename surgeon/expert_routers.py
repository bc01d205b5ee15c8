"""Routers for the experts that an FFN is split into: made from its weights, or fitted on calibration data.

Shapes: T tokens, H input width, I neurons, E experts of m neurons.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from surgeon.moments import AbsoluteRegression
from surgeon.numerics import centroid_router, ridge_regression, train_linear_router, train_mlp_router
from surgeon.routers import Router


def towards_rows(keys: Tensor, experts: Tensor, kind: Literal["centroid", "similarity"]) -> Router:
    """Nearness to the mean normalised row c_e of each expert (MoEfication).

    ``centroid``: ``<x, c_e>``.  ``similarity``: ``-|x / |x| - c_e|^2``.

    Args:
        keys: rows that decide whether a neuron is active, [I, H].
        experts: neurons, [E, m].
        kind: see above.
    """
    labels = torch.arange(experts.shape[0], device=keys.device).repeat_interleave(experts.shape[1])
    centres = centroid_router(keys[experts.flatten()].float(), labels, experts.shape[0])
    if kind == "centroid":
        return Router({"weight": centres.to(keys.dtype)})
    # -|u - c|^2 = 2 <u, c> - |c|^2 - 1 for a unit vector u
    bias = -centres.square().sum(1) - 1
    return Router({"weight": 2 * centres.to(keys.dtype), "bias": bias.to(keys.dtype)}, unit=True)


def towards_clusters(centroids: Tensor, dtype: torch.dtype) -> Router:
    """The nearest of the clusters of tokens [E, H] that experts were made for: ``<x, c_e> - |c_e|^2 / 2``."""
    return Router({"weight": centroids.to(dtype), "bias": (-centroids.square().sum(1) / 2).to(dtype)})


def from_sums(sums: AbsoluteRegression, experts: Tensor, dtype: torch.dtype) -> Router:
    """Ridge regression of ``sum_{i in e} |h_i|``, experts [E, m], from sums over all tokens.

    Raises:
        NumericsError: the regression has no solution.
    """
    assert sums.second_moment is not None
    assert sums.cross_moment is not None
    mass = torch.stack([sums.cross_moment[:, expert].sum(1) for expert in experts], dim=1)
    solution = ridge_regression(sums.second_moment, mass).to(dtype)
    return Router({"weight": solution[:-1].T, "bias": solution[-1]})


def fitted(x: Tensor, targets: Tensor, hidden: int | None, *, steps: int, seed: int, dtype: torch.dtype) -> Router:
    """A router that predicts targets [T, E] from tokens [T, H].

    Args:
        x: [T, H].
        targets: [T, E].
        hidden: width of its hidden layer; None: it has none, and is fitted by ridge regression.
        steps: of training, where there is a hidden layer.
        seed: likewise.
        dtype: of its weights.

    Raises:
        NumericsError: the fit fails.
    """
    if hidden is None:
        tensors, keys = train_linear_router(x, targets), ("weight", "bias")
        return Router({key: tensor.to(dtype) for key, tensor in zip(keys, tensors, strict=True)})
    trained = train_mlp_router(x, targets, width=hidden, steps=steps, seed=seed)
    names = ("hidden.weight", "hidden.bias", "weight", "bias")
    return Router({key: tensor.to(dtype) for key, tensor in zip(names, trained, strict=True)})
