"""Cutting a graph of neurons into parts of equal size with as much weight as possible inside the parts."""

from __future__ import annotations

import networkx as nx
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from surgeon.numerics.clustering import balanced_assignment, balanced_kmeans
from surgeon.numerics.errors import NumericsError, require_finite

_DENSE = 1024  # nodes up to which all eigenvectors are cheaper than some
_SWAPS_PER_ROUND = 64


def coactivation_graph(activations: Tensor, *, neighbours: int = 32) -> nx.Graph:
    """Build the graph whose edge i-j weighs how much two neurons are active for the same tokens.

    ``A_ij = sum_t a_ti a_tj / sqrt(sum_t a_ti^2 sum_t a_tj^2)`` with a = |activations|, in [0, 1]; an edge stays where
    it is among the ``neighbours`` heaviest of one of its ends, so that the graph grows with N and not with N^2.
    MoEfication (Zhang et al., 2022) counts ``sum min(1, sum of 8 tokens)`` instead and cuts at a percentile: without
    the normalisation, which it leaves to the partitioner, neurons that are always active are everybody's neighbour.

    Args:
        activations: [T, N].
        neighbours: edges that every node keeps, at least 1.

    Returns:
        N nodes 0 .. N - 1, edges with attribute ``weight``; a neuron that was never active has no edge.

    Raises:
        NumericsError: not a matrix, not finite, or ``neighbours`` below 1.
    """
    if activations.ndim != 2 or neighbours < 1:
        raise NumericsError(
            f"coactivation_graph: activations {list(activations.shape)} and neighbours {neighbours}, "
            "needed [T, N] and at least 1"
        )
    require_finite(activations=activations)
    unit = torch.nn.functional.normalize(activations.detach().abs().float(), dim=0)
    weights = unit.T @ unit
    weights.fill_diagonal_(0)
    count = weights.shape[0]
    heaviest = weights.topk(min(neighbours, count), dim=1)
    rows = np.repeat(np.arange(count), heaviest.indices.shape[1])
    values, columns = heaviest.values.flatten().cpu().numpy(), heaviest.indices.flatten().cpu().numpy()
    one_way = scipy.sparse.csr_array((values, (rows, columns)), shape=(count, count))
    both = one_way.maximum(one_way.T)
    both.eliminate_zeros()
    return nx.from_scipy_sparse_array(both)


def partition_graph(graph: nx.Graph, parts: int, *, seed: int = 0) -> Tensor:
    """Give every node a part so that all parts are equally large and little weight is cut.

    Spectral: balanced k-means on the first ``parts`` eigenvectors of the normalised adjacency matrix (rows of unit
    length; Ng, Jordan and Weiss, 2001).  Then two refinements that only ever raise the weight W inside parts:

    1. all nodes at once: a balanced assignment by weight towards each part, kept while W rises;
    2. swaps of two nodes, as Kernighan and Lin (1970): swapping i of a with j of b raises W by
       ``g = (D_ib - D_ia) + (D_ja - D_jb) - 2 A_ij`` with D_ic the weight of i towards part c.  The best disjoint swaps
       of a round are taken in order of g, each with its gain brought up to date.

    Args:
        graph: nodes 0 .. N - 1, non-negative edge attribute ``weight``.
        parts: P; must divide N.
        seed: of the k-means and of the eigenvectors' start.

    Returns:
        labels [N] int64.

    Raises:
        NumericsError: P does not divide N.
    """
    count = graph.number_of_nodes()
    if parts < 1 or count == 0 or count % parts:
        raise NumericsError(f"partition_graph: {count} nodes cannot be cut into {parts} parts of equal size")
    if parts == 1:
        return torch.zeros(count, dtype=torch.int64)
    adjacency = nx.to_scipy_sparse_array(graph, nodelist=range(count), weight="weight", format="csr", dtype=np.float64)
    vectors = torch.from_numpy(_leading_eigenvectors(adjacency, min(parts, count - 1), seed))
    labels = balanced_kmeans(torch.nn.functional.normalize(vectors, dim=1), parts, seed=seed, restarts=3).labels
    labels = _reassign(adjacency, labels, parts)
    return _swap(adjacency, labels, parts)


def inside_weight(graph: nx.Graph, labels: Tensor) -> float:
    """Weight of the edges whose ends are in one part."""
    label = labels.tolist()
    return float(sum(w for i, j, w in graph.edges(data="weight") if label[i] == label[j]))


def _leading_eigenvectors(adjacency: scipy.sparse.csr_array, count: int, seed: int) -> np.ndarray:
    """Eigenvectors [N, count] of the largest eigenvalues of D^-1/2 A D^-1/2."""
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    inverse = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-300)), 0.0)
    scaled = scipy.sparse.diags_array(inverse) @ adjacency @ scipy.sparse.diags_array(inverse)
    if adjacency.shape[0] <= _DENSE:
        return np.ascontiguousarray(np.linalg.eigh(scaled.toarray())[1][:, -count:])
    start = np.random.default_rng(seed).standard_normal(adjacency.shape[0])
    return np.ascontiguousarray(scipy.sparse.linalg.eigsh(scaled, k=count, which="LA", v0=start)[1])


def _towards(adjacency: scipy.sparse.csr_array, labels: Tensor, parts: int) -> np.ndarray:
    """D [N, P]: the weight of every node towards every part."""
    return np.asarray(adjacency @ torch.nn.functional.one_hot(labels, parts).double().numpy())


def _reassign(adjacency: scipy.sparse.csr_array, labels: Tensor, parts: int) -> Tensor:
    # W is convex in the assignment once A has a heavy diagonal, and then every such step raises it: stay is 0, half, all
    # of a node's degree.
    capacity = labels.numel() // parts
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    every = np.arange(labels.numel())
    towards = _towards(adjacency, labels, parts)
    inside = towards[every, labels.numpy()].sum()
    for stay in (0.0, 0.5, 1.0):
        while True:
            gain = towards.copy()
            gain[every, labels.numpy()] += stay * degree
            proposed = balanced_assignment(torch.from_numpy(-gain), capacity)
            moved = _towards(adjacency, proposed, parts)
            found = moved[every, proposed.numpy()].sum()
            if found <= inside * (1 + 1e-12):
                break
            labels, towards, inside = proposed, moved, found
    return labels


def _swap(adjacency: scipy.sparse.csr_array, labels: Tensor, parts: int) -> Tensor:
    label = labels.numpy().copy()
    every = np.arange(label.size)
    towards = _towards(adjacency, labels, parts)
    while True:
        own = towards[every, label]
        # the best partner of i in part b is sought among the nodes of b that gain most by moving to i's part
        leave = towards - own[:, None]  # [N, P]: what a node gains by moving alone
        pairs: list[tuple[float, int, int]] = []
        for a in range(parts):
            for b in range(a + 1, parts):
                left, right = np.flatnonzero(label == a), np.flatnonzero(label == b)
                left = left[np.argsort(-leave[left, b])[:_SWAPS_PER_ROUND]]
                right = right[np.argsort(-leave[right, a])[:_SWAPS_PER_ROUND]]
                gain = leave[left, b][:, None] + leave[right, a][None] - 2 * adjacency[left][:, right].toarray()
                for index in np.argsort(-gain, axis=None)[:_SWAPS_PER_ROUND]:
                    i, j = np.unravel_index(index, gain.shape)
                    if gain[i, j] <= 1e-9:
                        break
                    pairs.append((float(gain[i, j]), int(left[i]), int(right[j])))
        pairs.sort(reverse=True)
        done = 0
        touched: set[int] = set()
        for _, i, j in pairs:
            if i in touched or j in touched:
                continue
            a, b = label[i], label[j]
            gain = towards[i, b] - towards[i, a] + towards[j, a] - towards[j, b] - 2 * adjacency[i, j]
            if gain <= 1e-9:
                continue
            touched |= {i, j}
            for node, source, target in ((i, a, b), (j, b, a)):
                start, stop = adjacency.indptr[node], adjacency.indptr[node + 1]
                near, weight = adjacency.indices[start:stop], adjacency.data[start:stop]
                towards[near, source] -= weight
                towards[near, target] += weight
            label[i], label[j] = b, a
            done += 1
        if done == 0:
            return torch.from_numpy(label)
