"""ADM's evaluator behind the feature extractor, computed by our metrics: for scripts/verify_parity.py adm_evaluator."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fid import frechet_distance
from .inception_score import inception_score
from .precision_recall import in_manifold, manifold_radii
from .statistics import Statistics, compute_statistics

OVERFLOW = 100.0      # the folder's float32 entries: features times this overflow half precision


def adm_statistics(features: Tensor) -> Statistics:
    """Statistics (N, D) with ADM's mean: summed row by row in the features' own float32, which moves a distance by some 1e-7."""
    mean = torch.from_numpy(features.numpy().mean(axis=0)).double()
    return replace(compute_statistics(features), mean=mean)


def compute(folder: str | Path, given: Mapping[str, Tensor], draw: Any = None) -> dict[str, Tensor]:
    """Every output of the parity folder from its inputs `given`; there is nothing random, `draw` is not used."""
    config = json.loads((Path(folder) / "config.json").read_text())
    k = config["nearest_neighbour_k"]
    reference, samples = given["features_ref"], given["features_sample"]
    spatial = [adm_statistics(given[name]) for name in ("spatial_sample", "spatial_ref")]
    of_reference, of_samples = adm_statistics(reference), adm_statistics(samples)
    of_few = adm_statistics(samples[: config["rank_deficient_case"]["samples"]])
    stored = Statistics(given["stats_given.mu"].double(), given["stats_given.sigma"].double(), None)
    logits = samples.double() @ given["softmax_weight"].double()
    split_size = config["inception_score_splits_case"]["split_size"]
    numbers = {
        "fid": frechet_distance(of_samples, of_reference),
        "fid_given_reference_stats": frechet_distance(of_samples, stored),
        "fid_rank_deficient": frechet_distance(of_few, of_reference),
        "fid_same_set": frechet_distance(of_reference, of_reference),
        "sfid": frechet_distance(*spatial),
        "inception_score": inception_score(logits, config["inception_score_split_size"]).value,
        "inception_score_splits": inception_score(logits, split_size).value,
    }
    found = {
        "mu_ref": of_reference.mean.float(), "sigma_ref": of_reference.covariance,
        "mu_sample": of_samples.mean.float(), "sigma_sample": of_samples.covariance,
    }
    for suffix, scale in (("", 1.0), ("_float32", OVERFLOW)):
        radii_ref = manifold_radii(reference * scale, k, "adm-float16")
        radii_sample = manifold_radii(samples * scale, k, "adm-float16")
        inside = in_manifold(samples * scale, reference * scale, radii_ref, "adm-float16")
        covered = in_manifold(reference * scale, samples * scale, radii_sample, "adm-float16")
        numbers |= {f"precision{suffix}": float(inside.double().mean()), f"recall{suffix}": float(covered.double().mean())}
        found |= {f"radii_{name}{suffix}": radii[:, None] / scale**2 for name, radii in
                  (("ref", radii_ref), ("sample", radii_sample))}
    return found | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
