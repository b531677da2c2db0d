"""Means over tokens with bootstrap intervals over responses, because the tokens of one are not
independent of each other; and how different two sets of vectors are."""

import numpy as np
import torch

RESAMPLES = 2000


def resample(values: list[torch.Tensor]) -> tuple[float | None, np.ndarray]:
    """The values of every response → their mean over all tokens, None without any; and that mean in
    RESAMPLES draws of responses with replacement.

    The draws depend on the number of responses only, so that two runs' differences are paired."""
    sums = np.array([float(v.sum()) for v in values])
    counts = np.array([len(v) for v in values])
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    with np.errstate(invalid="ignore"):
        means = sums[draws].sum(1) / counts[draws].sum(1)
    return (float(sums.sum() / counts.sum()) if counts.sum() else None), means


def interval(draws: np.ndarray) -> list[float] | None:
    """The 2.5 and 97.5 percentiles; None where only one response had a value."""
    if np.nanmin(draws) == np.nanmax(draws):
        return None
    return np.nanpercentile(draws, [2.5, 97.5]).tolist()


def mean_distance(keys: torch.Tensor, queries: torch.Tensor) -> float:
    """How far the mean of queries (M, d) is from that of keys (N, d), in the keys' root mean square
    distance from theirs."""
    center = keys.mean(0)
    scale = (keys - center).square().sum(1).mean().sqrt()
    return float((center - queries.mean(0)).norm() / scale)
