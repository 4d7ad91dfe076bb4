"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017): FID, sFID, rFID, by the features given.

With S1 = L Lᵀ and M = Lᵀ S2 L = U diag(a) Uᵀ, the trace of (S1 S2)^½ is Σ √a. The transport map from the first Gaussian to
the second, whose square root the derivative needs, is T = L⁻ᵀ M^½ L⁻¹, and its inverse that of the way back.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from tokenizers_lab.errors import InputError

from .bootstrap import Interval
from .deterministic import map_in_order, one_thread
from .statistics import Statistics, compute_statistics

CHUNK = 2048       # samples of which influences are computed at once; part of the definition of the last digits
PIVOT = 1e-12      # a covariance whose smallest Cholesky pivot is below this share of its largest entry counts as singular


@dataclass(frozen=True)
class FrechetResult:
    """A Fréchet distance with its uncertainty."""

    value: float                  # as published distances are: of the samples at hand, biased upwards
    interval: Interval | None     # for the expected value at these numbers of samples; None: too few samples
    bias: float | None            # estimate of (value at these numbers of samples) − (value at infinitely many)
    warnings: tuple[str, ...]


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|μ₁ − μ₂|² + tr S₁ + tr S₂ − 2 tr (S₁ S₂)^½ in float64; ~−1e-13 is possible. The bits do not depend on threads.

    Raises InputError if the numbers of features differ.
    """
    _check_widths(first, second)
    roots = _roots(first, second)
    with one_thread():
        difference = first.mean - second.mean
        traces = first.covariance.diagonal().sum() + second.covariance.diagonal().sum()
        return float(difference @ difference + traces - 2 * roots.sum())


def _roots(first: Statistics, second: Statistics) -> Tensor:
    """Square roots of the eigenvalues of S₁ S₂."""
    with one_thread():
        if first.factor is not None and second.factor is not None:      # few samples: no roots of zeros that were rounded
            return torch.linalg.svdvals(first.factor.T @ second.factor)
        if first.factor is None and second.factor is not None:
            factor, other = second.factor, first
        else:
            factor, other = _factor(first), second
    inner = _inner(factor, other.covariance)
    with one_thread():
        return torch.linalg.eigvalsh(inner).clamp_min(0).sqrt()


def _check_widths(first: Statistics, second: Statistics) -> None:
    if first.width != second.width:
        raise InputError(f"the two sets have {first.width} and {second.width} features: they come from different networks")


def _factor(statistics: Statistics) -> Tensor:
    """F with F Fᵀ = covariance: the centred samples if they are few; Cholesky's, four times as fast as by eigenvalues, which
    serve where the matrix is (nearly) singular."""
    if statistics.factor is not None:
        return statistics.factor
    covariance = statistics.covariance
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and float(factor.diagonal().min()) ** 2 > PIVOT * float(covariance.diagonal().max()):
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def _inner(factor: Tensor, covariance: Tensor) -> Tensor:
    """Fᵀ S F, symmetric to the last bit; the columns of the products are fixed blocks, so that all cores help."""
    width = factor.shape[1]
    right = torch.cat(list(map_in_order(lambda columns: covariance @ columns, factor.split(max(1, width // 8), dim=1))), dim=1)
    inner = torch.cat(list(map_in_order(lambda columns: factor.T @ columns, right.split(max(1, width // 8), dim=1))), dim=1)
    return (inner + inner.T) / 2


def frechet_warnings(first: Statistics, second: Statistics) -> tuple[str, ...]:
    """What makes the distance unreliable, in words for the result; empty if nothing does."""
    return tuple(
        f"{name}: {one.n} samples are no more than the {one.width} features: the covariance is singular, the distance says little"
        for name, one in (("samples", first), ("reference", second))
        if one.n is not None and one.n <= one.width
    )


def evaluate_frechet(
    features: Tensor, reference: Tensor | Statistics, paired: bool = False, level: float = 0.95, uncertainty: bool = True
) -> FrechetResult:
    """Fréchet distance of features (N, D) to reference features (M, D), or to fixed statistics, with its interval.

    The interval is the infinitesimal jackknife's (Efron 1982, ch. 6): each sample's first-order influence on the distance,
    in closed form, equal to a delete-one jackknife to O(1/N). It covers the *expected value at these numbers of samples*,
    which is what two published FIDs of the same protocol can be compared by. `bias` is the second-order term of the same
    expansion: value − bias estimates the distance at infinitely many samples, with an interval of the same width.
    paired: features[i] and reference[i] belong together, as an image and its reconstruction do.
    Statistics as reference count as exact. Raises InputError on non-finite features, fewer than two, or unequal pairs.
    """
    first = compute_statistics(features)
    second = reference if isinstance(reference, Statistics) else compute_statistics(reference)
    value, warnings = frechet_distance(first, second), frechet_warnings(first, second)
    if isinstance(reference, Statistics):
        if paired:
            raise InputError("pairs need the reference's features, not its statistics")
    elif paired and len(features) != len(reference):
        raise InputError(f"{len(features)} features cannot be paired with {len(reference)}")
    if not uncertainty or warnings:
        return FrechetResult(value, None, None, warnings)
    expansion = _Expansion.build(first, second)
    if expansion is None:
        return FrechetResult(value, None, None, (*warnings, "a covariance is singular: no interval"))
    if not isinstance(reference, Statistics) and paired:
        variance, bias = expansion.of_pairs(features.detach().cpu(), reference.detach().cpu())
    else:
        variance, bias = expansion.of_samples(features.detach().cpu())
        if not isinstance(reference, Statistics):
            more = expansion.of_reference(reference.detach().cpu())
            variance, bias = variance + more[0], bias + more[1]
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return FrechetResult(value, Interval(value - half, value + half, level, "infinitesimal jackknife"), bias, warnings)


@dataclass
class _Expansion:
    """The distance's first and second derivatives along single samples, in the basis where both covariances are simple.

    Whitened first samples p = Uᵀ L⁻¹ (x − μ₁) have covariance 1; q = Uᵀ Lᵀ (y − μ₂) have covariance diag(a).
    """

    first: Statistics
    second: Statistics
    to_p: Tensor        # (D, D): p = to_pᵀ (x − μ₁)
    to_q: Tensor        # (D, D): q = to_qᵀ (y − μ₂)
    roots: Tensor       # (D,) √a

    @classmethod
    def build(cls, first: Statistics, second: Statistics) -> "_Expansion | None":
        """None where a covariance is singular: the derivative does not exist."""
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(first.covariance)
            if failed or float(lower.diagonal().min()) ** 2 <= PIVOT * float(first.covariance.diagonal().max()):
                return None
        inner = _inner(lower, second.covariance)
        with one_thread():
            values, vectors = torch.linalg.eigh(inner)
            if float(values[0]) <= PIVOT * float(values[-1]):
                return None
            to_p = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
            return cls(first, second, to_p, lower @ vectors, values.sqrt())

    def of_samples(self, features: Tensor) -> tuple[float, float]:
        """Variance and bias that the first set causes."""
        return self._one_set(features, self.first, self.second, self.to_p * self.roots)

    def of_reference(self, features: Tensor) -> tuple[float, float]:
        """Variance and bias that the second set causes."""
        return self._one_set(features, self.second, self.first, self.to_q)

    def _one_set(self, features: Tensor, own: Statistics, other: Statistics, basis: Tensor) -> tuple[float, float]:
        """basis: (D, D), whose v = basisᵀ c has covariance diag(a), and Σ v²/√a = cᵀ T c with the map T to the other set."""
        def chunk(rows: Tensor) -> tuple[Tensor, Tensor]:
            centred, v = self._centre(rows, own, basis)
            return self._influence(centred, v, own, other), (v * v).T @ (v * v)

        influences, products, n = [], torch.zeros_like(basis), len(features)
        for influence, product in map_in_order(chunk, features.split(CHUNK)):
            influences.append(influence)
            products += product
        with one_thread():
            spread = products / n - torch.diag(self.roots**4)        # Cov of v vᵀ, entry by entry
            bias = own.covariance.diagonal().sum() / n + (spread * self._curvature()).sum() / (2 * n)
            return _variance(torch.cat(influences)), float(bias)

    def of_pairs(self, features: Tensor, reference: Tensor) -> tuple[float, float]:
        """Variance and bias of pairs, whose two members vary together."""
        def chunk(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            x, v = self._centre(rows[0], self.first, self.to_p * self.roots)
            y, q = self._centre(rows[1], self.second, self.to_q)
            influence = self._influence(x, v, self.first, self.second) + self._influence(y, q, self.second, self.first)
            pq = v / self.roots * q
            own = (v * v).T @ (v * v) + (q * q).T @ (q * q)
            return torch.stack([influence, (x - y).square().sum(dim=1)]), own, pq.T @ pq

        rows, n = [], len(features)
        own, mixed = torch.zeros_like(self.to_p), torch.zeros_like(self.to_p)
        for row, own_part, mixed_part in map_in_order(chunk, zip(features.split(CHUNK), reference.split(CHUNK))):
            rows.append(row)
            own += own_part
            mixed += mixed_part
        with one_thread():
            influences, distances = torch.cat(rows, dim=1)
            own = own / n - 2 * torch.diag(self.roots**4)
            mixed = mixed / n - torch.diag(self.roots**2)             # less the part E[p pᵀ] E[q qᵀ] = 1 · a of the diagonal
            crossed = (mixed / (self.roots[:, None] + self.roots)).sum()
            bias = (distances.mean() + (own * self._curvature()).sum() / 2 - crossed) / n
            return _variance(influences), float(bias)

    def _centre(self, rows: Tensor, own: Statistics, basis: Tensor) -> tuple[Tensor, Tensor]:
        centred = rows.double() - own.mean
        return centred, centred @ basis

    def _influence(self, centred: Tensor, v: Tensor, own: Statistics, other: Statistics) -> Tensor:
        """First derivative of the distance towards each sample, up to a constant: 2 (μ − μ') c + |c|² − cᵀ T c."""
        return 2 * centred @ (own.mean - other.mean) + centred.square().sum(dim=1) - (v.square() / self.roots).sum(dim=1)

    def _curvature(self) -> Tensor:
        """Minus the second derivative of 2 tr A^½ at A = diag(a), for entries (j, k): 1 / (√a_j √a_k (√a_j + √a_k))."""
        r = self.roots
        return 1 / (r[:, None] * r * (r[:, None] + r))


def _variance(influence: Tensor) -> float:
    """Variance of the distance: that of the mean influence."""
    n = len(influence)
    return float((influence - influence.mean()).square().sum()) / (n * (n - 1))


def frechet_json(result: FrechetResult) -> dict[str, Any]:
    """The result as JSON data: value, uncertainty, bias, warnings."""
    interval = None if result.interval is None else vars(result.interval)
    return {"value": result.value, "uncertainty": interval, "bias_estimate": result.bias, "warnings": list(result.warnings)}
