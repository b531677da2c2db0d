"""Tables over training seeds: means, standard deviations, paired differences with intervals."""

import math
import statistics

import numpy as np

from data import same_data

# metric → heading, digits, which is best
METRICS = {
    "bits_per_byte": ("bits per byte (lower is better)", 3, min),
    "rouge_l": ("ROUGE-L × 100, sampled", 2, max),
    "kl_to_truth": ("KL(truth ‖ model), bits per answer (lower is better)", 2, min),
}
# What a row of a set has: the sum of these over the sum of those is the set's score.
BY_ROW = {"bits_per_byte": ("bits_by_row", "bytes_by_row"), "rouge_l": ("rouge_l_by_row", None)}


def columns_of(sets: list[str], trained_on: str) -> dict[str, list[str]]:
    """heading → the sets it is a mean of: each set, and "OOD", those not trained on."""
    columns = {name: [name] for name in sets}
    others = [name for name in sets if not same_data(name, trained_on)]
    if 0 < len(others) < len(sets):
        columns["OOD"] = others
    return columns


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """The standard deviation of a single value is nan."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def summarize(cells: dict[str, dict[int, dict]], columns: dict[str, list[str]]) -> dict:
    """cells: row → training seed → the sets of rouge.json. → metric → row → column → (mean,
    standard deviation over training seeds)."""
    table = {}
    for metric in METRICS:
        table[metric] = {}
        for row, by_seed in cells.items():
            of_row = {}
            for heading, names in columns.items():
                values = [[of_seed[name][metric] for name in names] for of_seed in by_seed.values()]
                if all(value is not None for of_seed in values for value in of_seed):
                    of_row[heading] = mean_and_std([statistics.mean(v) for v in values])
            table[metric][row] = of_row
    return table


def paired_difference(
    ours: dict[int, dict],
    theirs: dict[int, dict],
    names: list[str],
    metric: str,
    resamples: int = 2000,
) -> tuple[float, float, float] | None:
    """Our score minus theirs, a mean over training seeds and sets, and its 95 % bootstrap interval:
    training seeds are drawn, and within each set its rows, for both alike. Over the seeds that both
    have; None where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    rng = np.random.default_rng(0)
    drawn_seeds = rng.integers(len(seeds), size=(resamples, len(seeds)))
    values, weights = BY_ROW[metric]
    difference, draws = 0.0, np.zeros(resamples)
    for name in names:
        num_rows = len(ours[seeds[0]][name][values])
        drawn_rows = rng.integers(num_rows, size=(resamples, num_rows))
        for sign, side in ((1, ours), (-1, theirs)):
            scores = np.array([side[seed][name][values] for seed in seeds])  # (seeds, rows)
            sizes = (
                np.ones(num_rows) if weights is None else np.array(side[seeds[0]][name][weights])
            )
            difference += sign * scores.mean(0).sum() / sizes.sum() / len(names)
            for r in range(resamples):
                of_seeds = scores[:, drawn_rows[r]].sum(1) / sizes[drawn_rows[r]].sum()
                draws[r] += sign * of_seeds[drawn_seeds[r]].mean() / len(names)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(difference), float(low), float(high)


def markdown(
    cells: dict[str, dict[int, dict]],
    columns: dict[str, list[str]],
    trained_on: str,
    baselines: list[str],
) -> str:
    """A table for each metric, the best of a column in bold, and one of the differences."""
    parts = []
    for metric, of_metric in summarize(cells, columns).items():
        heading, digits, best_of = METRICS[metric]
        shown = [c for c in columns if all(c in of_row for of_row in of_metric.values())]
        if not shown:
            continue
        best = {c: best_of(of_row[c][0] for of_row in of_metric.values()) for c in shown}
        lines = [f"| {heading} | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
        for row, of_row in of_metric.items():
            texts = []
            for c in shown:
                mean, std = of_row[c]
                text = f"{mean:.{digits}f}"
                if math.isfinite(std):
                    text += f" ± {std:.{digits}f}"
                texts.append(f"**{text}**" if mean == best[c] else text)
            lines.append(f"| `{row}` | {len(cells[row])} | {' | '.join(texts)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts + difference_tables(cells, columns, trained_on, baselines)) + "\n"


def difference_tables(cells, columns, trained_on, baselines) -> list[str]:
    """For every baseline each row minus it, on the set trained on and on the OOD mean."""
    compared = {
        heading: names
        for heading, names in columns.items()
        if heading == "OOD" or same_data(heading, trained_on)
    }
    tables = []
    for baseline in baselines:
        if baseline not in cells or len(cells) == 1 or not compared:
            continue
        headings = [f"{heading}: {short}" for heading in compared for short in ("bits", "ROUGE-L")]
        lines = [
            f"| minus `{baseline}` | {' | '.join(headings)} |",
            "|---" * (len(headings) + 1) + "|",
        ]
        for row in cells:
            if row == baseline:
                continue
            texts = []
            for names in compared.values():
                for metric in ("bits_per_byte", "rouge_l"):
                    digits = METRICS[metric][1]
                    found = paired_difference(cells[row], cells[baseline], names, metric)
                    text = ""
                    if found:
                        text = "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*found, n=digits)
                    texts.append(text)
            lines.append(f"| `{row}` | {' | '.join(texts)} |")
        tables.append("\n".join(lines))
    return tables
