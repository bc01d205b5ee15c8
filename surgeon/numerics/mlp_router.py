"""A router with one hidden layer, trained on kept tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon.numerics.errors import NumericsError, require_finite

_CHECK_EVERY = 25


class MLPRouter(NamedTuple):
    """``scores = w_out relu(w_in x + b_in) + b_out``: w_in [W, D], b_in [W], w_out [E, W], b_out [E]."""

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor


def train_mlp_router(
    inputs: Tensor,
    targets: Tensor,
    *,
    width: int = 128,
    steps: int = 600,
    batch: int = 512,
    rate: float = 3e-3,
    seed: int = 0,
) -> MLPRouter:
    """Fit ``scores(x)`` to targets by mean squared error, as the routers of D2DMoE (Szatkowski et al., 2024).

    Adam with a rate that falls linearly to zero; a tenth of the tokens is held out and the state that does best there is
    returned.  Inputs are standardised while training and targets centred, per expert, and brought to unit spread over
    all experts; both are folded into the weights afterwards.  D2DMoE has no biases and takes absolute values behind;
    here a bias stands for what no input explains.

    Args:
        inputs: [T, D].
        targets: [T, E], what is predicted of each expert.
        width: W.
        steps: of the optimiser.
        batch: tokens per step.
        rate: first learning rate.
        seed: of initialisation and order; the same seed gives the same weights.

    Returns:
        The weights in the dtype of ``inputs``.

    Raises:
        NumericsError: shapes do not fit, fewer than 20 tokens, or numbers that are not finite.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or inputs.shape[0] != targets.shape[0] or inputs.shape[0] < 20:
        raise NumericsError(
            f"train_mlp_router: inputs {list(inputs.shape)} and targets {list(targets.shape)}, "
            "needed [T, D] and [T, E] of at least 20 tokens"
        )
    require_finite(inputs=inputs, targets=targets)
    x, y = inputs.detach().float(), targets.detach().float()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    centre, scale = y.mean(0), (y - y.mean(0)).std().clamp_min(1e-12)
    x, y = (x - mean) / spread, (y - centre) / scale
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(x.shape[0], generator=generator).to(x.device)
    held, rest = order[: x.shape[0] // 10], order[x.shape[0] // 10 :]

    def initial(rows: int, columns: int, gain: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul(math.sqrt(gain / columns)).to(x.device)

    parameters = [initial(width, x.shape[1], 2.0), x.new_zeros(width), initial(y.shape[1], width, 0.1), y.new_zeros(y.shape[1])]
    with torch.enable_grad():
        weights = [p.requires_grad_() for p in parameters]
        optimiser = torch.optim.Adam(weights, lr=rate)
        best, kept = float("inf"), [p.detach().clone() for p in weights]
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
            rows = rest[torch.randint(rest.numel(), (min(batch, rest.numel()),), generator=generator).to(x.device)]
            loss = (_scores(x[rows], weights) - y[rows]).square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # of torch
            optimiser.step()
            if step % _CHECK_EVERY == _CHECK_EVERY - 1 or step == steps - 1:
                with torch.no_grad():
                    error = float((_scores(x[held], weights) - y[held]).square().mean())
                if error < best:
                    best, kept = error, [p.detach().clone() for p in weights]
    w_in, b_in, w_out, b_out = kept
    w_in = w_in / spread
    return MLPRouter(*(t.to(inputs.dtype) for t in (w_in, b_in - w_in @ mean, w_out * scale, b_out * scale + centre)))


def _scores(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_in, b_in, w_out, b_out = weights
    return torch.relu(x @ w_in.T + b_in) @ w_out.T + b_out
