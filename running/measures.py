"""Statistics: what probe.py measures of attention, keys and queries, and the bootstrap intervals of all tables.

Intervals are over samples (rows), not over tokens, which are not independent of each other."""
import numpy as np
import torch
import torch.nn.functional as F

RESAMPLES = 2000
MOST_POINTS = 1000      # keys, and queries, in the scatter and in the energy distance

MEASURES = {
    "mass": "attention inside the right chunk",
    "hit": "strongest weight inside it",
    "mass_once": "  inside, tokens that occur once",
    "hit_once": "  strongest, tokens that occur once",
    "mass_repeated": "  inside, tokens that repeat",
    "hit_repeated": "  strongest, tokens that repeat",
    "entropy_bits": "entropy (bits)",
    "byte_distance": "token to the attention's centre (bytes)",
    "monotone_steps": "steps on which the centre moves on or stays",
}
SHARES = {name for name in MEASURES if name.startswith(("mass", "hit", "monotone"))}

def measure(weights: torch.Tensor, same_chunk: torch.Tensor, repeats: torch.Tensor, middles: torch.Tensor,
            other_middles: torch.Tensor) -> dict[str, torch.Tensor]:
    """One sample, one direction → for each of MEASURES its values, one a token (or a step), whose mean is the number.
    weights (N, M): how much each of N tokens takes of each of M on the other side; same_chunk (N, M) bool; repeats (N,)
    bool: the token occurs more than once among the N; middles (N,) and other_middles (M,): of the tokens' spans, in
    bytes. Weights that are equally strong share a hit. A token whose chunk has nothing on the other side (its text was
    cut there) has no right place and is left out of everything."""
    kept = same_chunk.any(1)
    weights, same_chunk, repeats, middles = (x[kept] for x in (weights.double(), same_chunk, repeats, middles))
    strongest = weights == weights.amax(1, keepdim=True)
    mass = (weights * same_chunk).sum(1)
    hit = (strongest & same_chunk).sum(1) / strongest.sum(1)
    centre = weights @ other_middles.double()
    return {"mass": mass, "hit": hit, "mass_once": mass[~repeats], "hit_once": hit[~repeats],
            "mass_repeated": mass[repeats], "hit_repeated": hit[repeats],
            "entropy_bits": torch.special.entr(weights).sum(1) / np.log(2), "byte_distance": (centre - middles).abs(),
            "monotone_steps": (centre.diff() > -1e-3).double()}

def resample(values: list[torch.Tensor]) -> tuple[float | None, np.ndarray]:
    """Every sample's values → their mean over all tokens (None where there is no value), and that mean in RESAMPLES
    draws of samples with replacement (NaN where there is none). The draws depend on the number of samples only, so that
    two checkpoints' differences are paired."""
    sums, counts = np.array([float(v.sum()) for v in values]), np.array([len(v) for v in values])
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    with np.errstate(invalid="ignore"):
        means = sums[draws].sum(1) / counts[draws].sum(1)
    return (float(sums.sum() / counts.sum()) if counts.sum() else None), means

def interval(draws: np.ndarray) -> list[float]:
    """The 2.5 and 97.5 percentiles of the draws that have a value."""
    return np.nanpercentile(draws, [2.5, 97.5]).tolist()

def tell_apart(keys: torch.Tensor, queries: torch.Tensor, key_fold: torch.Tensor,
               query_fold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Is a logistic probe right about each held-out key and query? (N, d), (M, d) → (N,), (M,) of 0 and 1.
    key_fold (N,), query_fold (M,): 0 or 1. The probe is trained on each fold in turn, with an L2 penalty and both
    classes weighing the same, and asked about the other. No random numbers."""
    right_keys, right_queries = torch.zeros(len(keys)), torch.zeros(len(queries))
    for fold in (0, 1):
        x_keys, x_queries = keys[key_fold == fold].float(), queries[query_fold == fold].float()
        both = torch.cat([x_keys, x_queries])
        mean, scale = both.mean(0), both.std(0).clamp(min=1e-6)
        x_keys, x_queries = (x_keys - mean) / scale, (x_queries - mean) / scale
        w = torch.zeros(keys.size(1) + 1, device=keys.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.softplus(-(x_keys @ w[:-1] + w[-1])).mean() + F.softplus(x_queries @ w[:-1] + w[-1]).mean()
            value = value + 1e-3 * w[:-1].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        w = w.detach()

        def score(vectors):
            return ((vectors.float() - mean) / scale @ w[:-1] + w[-1]).cpu()
        right_keys[key_fold != fold] = (score(keys[key_fold != fold]) > 0).float()
        right_queries[query_fold != fold] = (score(queries[query_fold != fold]) < 0).float()
    return right_keys, right_queries

def evenly(vectors: torch.Tensor) -> torch.Tensor:
    """At most MOST_POINTS of them."""
    return vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), MOST_POINTS)).long()]

def distances(keys: torch.Tensor, queries: torch.Tensor) -> dict[str, float]:
    """How far queries (M, d) are from keys (N, d), in the root mean square distance of a key from the keys' mean.
    mean_distance: ‖mean K − mean Q‖. energy_distance (Székely & Rizzo): 2 E‖K − Q‖ − E‖K − K'‖ − E‖Q − Q'‖ over
    different tokens, which is 0 on average for equal distributions; of at most MOST_POINTS evenly chosen tokens a side.
    """
    keys, queries = keys.double(), queries.double()
    deviation = (keys - keys.mean(0)).square().sum(1).mean().sqrt()
    some_keys, some_queries = evenly(keys), evenly(queries)
    within = sum(torch.pdist(x).mean() for x in (some_keys, some_queries))
    return {"mean_distance": float((keys.mean(0) - queries.mean(0)).norm() / deviation),
            "energy_distance": float((2 * torch.cdist(some_keys, some_queries).mean() - within) / deviation)}

def paired_bootstrap(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]],
                     weights: tuple[list[np.ndarray], list[np.ndarray]] | None = None, resamples: int = RESAMPLES,
                     seed: int = 0) -> tuple[float, float, float]:
    """The difference of two rows of the table and its 95% interval. ours, theirs: by training seed, the same ones in
    the same order, and by set, the scores of the set's rows. The score is the mean over seeds of the mean over sets of
    Σ rows / Σ weights (by side and set; default 1 a row); seeds are drawn with replacement, in each set rows, for both
    alike."""
    rng, number = np.random.default_rng(seed), len(ours)
    sides = [[np.stack(of_set) for of_set in zip(*side)] for side in (ours, theirs)]         # by set: (seeds, rows)
    weights = weights or [[np.ones(scores.shape[1]) for scores in side] for side in sides]
    sets, drawn_seeds = len(sides[0]), np.zeros((resamples, number))
    for r, drawn in enumerate(rng.integers(number, size=(resamples, number))):
        np.add.at(drawn_seeds[r], drawn, 1 / number)
    means = np.zeros(resamples)
    whole = 0.0
    for (a, b), (w_a, w_b) in zip(zip(*sides), zip(*weights)):
        rows = a.shape[1]
        for r, drawn in enumerate(rng.integers(rows, size=(resamples, rows))):
            of_seeds = a[:, drawn].sum(1) / w_a[drawn].sum() - b[:, drawn].sum(1) / w_b[drawn].sum()
            means[r] += drawn_seeds[r] @ of_seeds / sets
        whole += (a.mean(0).sum() / w_a.sum() - b.mean(0).sum() / w_b.sum()) / sets
    return float(whole), *np.percentile(means, [2.5, 97.5]).tolist()
