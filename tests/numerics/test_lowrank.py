"""Low-rank factors against the theorems they stand on and against the Cholesky form."""

import pytest
import torch
from torch import Tensor

from surgeon.numerics import NumericsError, rank_for_ratio, saves, truncated_svd, whitened_svd

SHAPES = [(24, 40), (40, 24), (32, 32)]


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_inputs(width: int, tokens: int, seed: int = 1) -> Tensor:
    """Inputs [width, tokens] whose directions differ in energy by a factor of a thousand."""
    return gaussian(width, width, seed=seed) @ (
        torch.logspace(0, -3, width).double()[:, None] * gaussian(width, tokens, seed=seed + 1)
    )


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_truncated_svd_loses_the_discarded_singular_values(out: int, in_: int, rank: int) -> None:
    weight = gaussian(out, in_, seed=0)
    result = truncated_svd(weight, rank)
    assert result.left.shape == (out, rank)
    assert result.right.shape == (rank, in_)
    discarded = torch.linalg.svdvals(weight)[rank:].norm()
    assert result.tail == pytest.approx(float(discarded), rel=1e-12)
    assert float((weight - result.left @ result.right).norm()) == pytest.approx(result.tail, rel=1e-9)
    torch.testing.assert_close(result.left.norm(dim=0), result.right.norm(dim=1))


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 23])
@pytest.mark.parametrize("tokens", [500, 16])
def test_whitened_tail_is_the_loss_on_calibration_data(out: int, in_: int, rank: int, tokens: int) -> None:
    weight, x = gaussian(out, in_, seed=0), correlated_inputs(in_, tokens)
    result = whitened_svd(weight, x @ x.T, rank)
    loss = float(((weight - result.left @ result.right) @ x).norm())
    # Squared values carry the rounding of the whole, which is all that is left past as many ranks as tokens.
    rounding = 1e-13 * float((weight @ x).square().sum())
    assert loss**2 == pytest.approx(result.tail**2, rel=1e-9, abs=rounding)
    # Second implementation: the best approximation of the outputs WX of that rank (Eckart-Young).
    optimum = float(torch.linalg.svdvals(weight @ x)[rank:].norm())
    assert result.tail**2 == pytest.approx(optimum**2, rel=1e-9, abs=rounding)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_whitened_equals_the_cholesky_form(out: int, in_: int) -> None:
    weight, x = gaussian(out, in_, seed=0), correlated_inputs(in_, 500)
    root = torch.linalg.cholesky(x @ x.T)
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :9] * s[:9]) @ torch.linalg.solve_triangular(root, vt[:9], upper=False, left=False)
    result = whitened_svd(weight, x @ x.T, 9)
    torch.testing.assert_close(result.left @ result.right, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result.left.norm(dim=0), result.right.norm(dim=1))


def test_whitened_is_better_than_plain_on_correlated_inputs() -> None:
    weight, x = gaussian(48, 64, seed=0), correlated_inputs(64, 400)
    plain, whitened = truncated_svd(weight, 12), whitened_svd(weight, x @ x.T, 12)
    loss = [float(((weight - f.left @ f.right) @ x).norm()) for f in (plain, whitened)]
    assert loss[1] < 0.8 * loss[0]
    # On white inputs the two are the same approximation.
    white = whitened_svd(weight, 3.0 * torch.eye(64).double(), 12)
    torch.testing.assert_close(white.left @ white.right, plain.left @ plain.right)
    assert white.tail == pytest.approx(3**0.5 * plain.tail, rel=1e-12)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 5, 500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_rank_is_the_weight_whatever_calibration_saw(out: int, in_: int, tokens: int, dtype: torch.dtype) -> None:
    weight, x = gaussian(out, in_, seed=0).to(dtype), correlated_inputs(in_, tokens)
    result = whitened_svd(weight, x @ x.T, min(out, in_))
    assert result.left.dtype == result.right.dtype == dtype
    error = (result.left.double() @ result.right.double() - weight.double()).norm() / weight.double().norm()
    assert float(error) < (1e-12 if dtype == torch.float64 else 3e-7)


def test_rank_beyond_what_was_seen_goes_to_the_rest_of_the_weight() -> None:
    weight, x = gaussian(40, 24, seed=0), correlated_inputs(24, 5)
    u = torch.linalg.svd(weight @ x, full_matrices=False)[0]
    remainder = weight - u @ u.T @ weight
    result = whitened_svd(weight, x @ x.T, 9)
    assert float((weight - result.left @ result.right).norm()) == pytest.approx(
        float(torch.linalg.svdvals(remainder)[4:].norm()), rel=1e-7
    )
    assert float(((weight - result.left @ result.right) @ x).norm()) < 1e-7 * float((weight @ x).norm())


def test_a_rank_deficient_weight_is_exact_at_its_rank() -> None:
    weight, x = gaussian(32, 6, seed=0) @ gaussian(6, 40, seed=3), correlated_inputs(40, 3)
    for rank in (6, 10, 32):
        result = whitened_svd(weight, x @ x.T, rank)
        torch.testing.assert_close(result.left @ result.right, weight)


def test_a_huge_feature_does_not_hide_the_others() -> None:
    weight, x = gaussian(24, 32, seed=0), gaussian(32, 400, seed=4)
    x[5] *= 1e4
    moment = (x.float() @ x.float().T).double()  # summed in float32, as calibration may
    result = whitened_svd(weight, moment, 8)
    optimum = float(torch.linalg.svdvals(weight @ x)[8:].norm())
    assert float(((weight - result.left @ result.right) @ x).norm()) == pytest.approx(optimum, rel=1e-3)


def test_rank_for_ratio_keeps_that_share_of_parameters() -> None:
    assert rank_for_ratio(384, 1536, 0.5) == 153  # 0.5 * 384 * 1536 / 1920 = 153.6
    assert rank_for_ratio(100, 100, 0.3) == 15  # exactly 15: 0.3 is not exact in binary
    assert rank_for_ratio(384, 1536, 1.0) == rank_for_ratio(384, 1536, 2.0) == 384
    assert rank_for_ratio(8, 8, 0.01) == 1
    for ratio in (0.1, 0.25, 0.7, 0.95):
        rank = rank_for_ratio(384, 1152, ratio)
        assert rank * (384 + 1152) <= ratio * 384 * 1152 < (rank + 1) * (384 + 1152)
        assert saves(384, 1152, rank)
    assert not saves(384, 384, 192)
    assert saves(384, 384, 191)


def test_what_cannot_be_factored_is_refused() -> None:
    weight = gaussian(4, 6, seed=0)
    with pytest.raises(NumericsError, match=r"rank = 5, needed within \[1, 4\]"):
        truncated_svd(weight, 5)
    with pytest.raises(NumericsError, match=r"needed \[6, 6\]"):
        whitened_svd(weight, torch.eye(4).double(), 2)
    with pytest.raises(NumericsError, match="no calibration input"):
        whitened_svd(weight, torch.zeros(6, 6).double(), 2)
    with pytest.raises(NumericsError, match="none below 0"):
        whitened_svd(weight, torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -0.5])), 2)
    with pytest.raises(NumericsError, match="second_moment: 36 of 36"):
        whitened_svd(weight, torch.full((6, 6), float("nan")), 2)
    with pytest.raises(NumericsError, match="ratio = 0"):
        rank_for_ratio(4, 4, 0.0)
    with pytest.raises(NumericsError, match="ratio = nan"):
        rank_for_ratio(4, 4, float("nan"))
