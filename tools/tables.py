"""Tables over training seeds: means, standard deviations, paired differences with intervals."""

import math
import statistics

import numpy as np

from data import same_data

# metric → heading, digits, which is best
METRICS = {
    "bits_per_byte": ("bits per byte (lower is better)", 3, min),
    "rouge_l": ("ROUGE-L × 100, sampled", 2, max),
    "rouge_l_greedy": ("ROUGE-L × 100, greedy", 2, max),
    "kl_to_truth": ("KL(truth ‖ model), bits per answer (lower is better)", 2, min),
}
# What a row of a set has: the sum of these over the sum of those is the set's score.
BY_ROW = {
    "bits_per_byte": ("bits_by_row", "bytes_by_row"),
    "rouge_l": ("rouge_l_by_row", None),
    "rouge_l_greedy": ("rouge_l_greedy_by_row", None),
}


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


def t_quantile(probability: float, freedom: float) -> float:
    """Of Student's t distribution, by integration: t = √ν tan θ has a density like cos(θ)^(ν−1)."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.cos(angle).clip(0) ** (freedom - 1) if freedom != 1 else np.ones_like(angle)
    share = (np.cumsum(density) - density / 2) / density.sum()
    return float(freedom**0.5 * np.tan(np.interp(probability, share, angle)))


def paired_difference(
    ours: dict[int, dict], theirs: dict[int, dict], names: list[str], metric: str
) -> tuple[float, float, float] | None:
    """Our score minus theirs, a mean over training seeds and sets, and its 95 % interval: what
    other training seeds and other rows would give, with one seed only what other rows would. Over
    the seeds that both have; None where there is none.

    Seeds s and a set's rows r are crossed: the difference of a row is μ + a_s + b_r + e_sr. The
    variance of the mean is that of the seeds' means, which holds a and e, and that of the rows, b,
    estimated from mean squares; the interval is Student's, with Satterthwaite's degrees of freedom.
    Bits per byte are a ratio of sums, taken to first order."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    values, weights = BY_ROW[metric]
    by_seed = np.zeros(len(seeds))
    of_rows, freedom_of_rows = 0.0, 0
    for name in names:
        scores = np.array([ours[s][name][values] for s in seeds])  # (seeds, rows)
        scores = scores - np.array([theirs[s][name][values] for s in seeds])
        if weights is not None:
            sizes = np.array(ours[seeds[0]][name][weights])
            ratio = scores.sum() / (len(seeds) * sizes.sum())
            scores = ratio + (scores - ratio * sizes) / sizes.mean()
        by_seed += scores.mean(1) / len(names)
        num_rows = scores.shape[1]
        row_means = scores.mean(0)
        rest = scores - row_means - scores.mean(1, keepdims=True) + scores.mean()
        of_rest = (rest**2).sum() / max(1, (num_rows - 1) * (len(seeds) - 1)) / len(seeds)
        of_rows += max(0.0, row_means.var(ddof=1) - of_rest) / num_rows / len(names) ** 2
        freedom_of_rows += num_rows - 1
    of_seeds, freedom_of_seeds = 0.0, 1
    if len(seeds) > 1:
        of_seeds, freedom_of_seeds = by_seed.var(ddof=1) / len(seeds), len(seeds) - 1
    variance = of_seeds + of_rows
    freedom = variance**2 / (of_seeds**2 / freedom_of_seeds + of_rows**2 / freedom_of_rows + 1e-300)
    mean = float(by_seed.mean())
    reach = t_quantile(0.975, max(freedom, 1.0)) * variance**0.5
    return mean, mean - reach, mean + reach


def winner(cells, names: list[str], of_metric, column: str, metric: str, best_of) -> str | None:
    """The best row of a column, where noise does not explain that it is ahead of the next."""
    if metric not in BY_ROW or len(of_metric) < 2:
        return None
    order = sorted(of_metric, key=lambda row: of_metric[row][column][0], reverse=best_of is max)
    found = paired_difference(cells[order[0]], cells[order[1]], names, metric)
    return order[0] if found and found[1] * found[2] > 0 else None


def markdown(
    cells: dict[str, dict[int, dict]],
    columns: dict[str, list[str]],
    trained_on: str,
    baselines: list[str],
) -> str:
    """A table for each metric, the best of a column in bold where its interval to the next best is
    clear of zero, and one of the differences."""
    parts = []
    for metric, of_metric in summarize(cells, columns).items():
        heading, digits, best_of = METRICS[metric]
        shown = [c for c in columns if all(c in of_row for of_row in of_metric.values())]
        if not shown:
            continue
        winners = {c: winner(cells, columns[c], of_metric, c, metric, best_of) for c in shown}
        lines = [f"| {heading} | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
        for row, of_row in of_metric.items():
            texts = []
            for c in shown:
                mean, std = of_row[c]
                text = f"{mean:.{digits}f}"
                if math.isfinite(std):
                    text += f" ± {std:.{digits}f}"
                texts.append(f"**{text}**" if row == winners[c] else text)
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
        shown = ("bits", "ROUGE-L", "greedy")
        headings = [f"{heading}: {short}" for heading in compared for short in shown]
        lines = [
            f"| minus `{baseline}` | {' | '.join(headings)} |",
            "|---" * (len(headings) + 1) + "|",
        ]
        for row in cells:
            if row == baseline:
                continue
            texts = []
            for names in compared.values():
                for metric in BY_ROW:
                    digits = METRICS[metric][1]
                    found = paired_difference(cells[row], cells[baseline], names, metric)
                    text = ""
                    if found:
                        text = "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*found, n=digits)
                    texts.append(text)
            lines.append(f"| `{row}` | {' | '.join(texts)} |")
        tables.append("\n".join(lines))
    return tables
