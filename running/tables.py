"""Tables over training seeds: means, deviations, and paired differences with their intervals (tools/compare.py)."""
import math
import statistics

import numpy as np

from files import hub
from running.measures import paired_bootstrap

# what is tabled: heading, digits, which is best
METRICS = {"bits_per_byte": ("bits a byte (lower is better)", 3, min),
           "rouge_l": ("ROUGE-L × 100, sampled; dev: greedy", 2, max),
           "kl_to_truth": ("KL(truth ‖ model), bits an answer (lower is better)", 2, min)}

def summarize(records: list[dict], rows: list[str], sets: list[str], trained_on: str,
              baselines: list[str]) -> list[dict]:
    """The table's rows: for each metric and column the mean and the standard deviation over training seeds, and the
    differences to the baselines, over the seeds that both have. records: lines of results.jsonl."""
    others = [name for name in sets if not hub.same_data(name, trained_on)]
    columns = {name: [name] for name in sets} | ({"all": sets} if len(sets) > 1 else {})
    columns |= {"OOD": others} if others and len(others) < len(sets) else {}
    compared = {name: members for name, members in columns.items() if name == "OOD" or name not in ("all", *others)}
    compared = compared or {"all": sets}
    of = {row: {r["seed"]: r for r in records if r["row"] == row} for row in rows}
    table = []
    for row, cells in of.items():
        if not cells:
            continue
        line = {"row": row, "seeds": sorted(cells), "columns": {}, "differences": {}}
        for metric in METRICS:
            values = {heading: [[c["sets"][name][metric] for name in members] for c in cells.values()]
                      for heading, members in columns.items()}
            dev = [c[f"dev_{metric}"] for c in cells.values() if c.get(f"dev_{metric}") is not None]
            means = {"dev": spread(dev)} if dev else {}
            means |= {heading: spread([statistics.mean(v) for v in each]) for heading, each in values.items()
                      if all(x is not None for v in each for x in v)}
            line["columns"][metric] = means
        for baseline in baselines:
            both = sorted(cells.keys() & of.get(baseline, {}).keys())
            if row != baseline and both:
                pair = [[of[which][seed]["sets"] for seed in both] for which in (row, baseline)]
                line["differences"][baseline] = {heading: differences(*pair, members)
                                                 for heading, members in compared.items()}
        table.append(line)
    return table

def differences(ours: list[dict], theirs: list[dict], names: list[str]) -> dict[str, tuple[float, float, float]]:
    """metric → difference and interval over some sets. ours, theirs: by training seed, the sets of results.jsonl."""
    def by_row(cells, what):
        return [[np.array(sets[name][what]) for name in names] for sets in cells]
    weights = [by_row(side, "bytes")[0] for side in (ours, theirs)]             # of all training seeds the same
    return {"bits_per_byte": paired_bootstrap(by_row(ours, "bits"), by_row(theirs, "bits"), weights),
            "rouge_l": paired_bootstrap(by_row(ours, "rows"), by_row(theirs, "rows"))}

def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is nan for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan

def markdown(table: list[dict], scoring_seeds: list[int]) -> str:
    """A table for each metric, the best of a column in bold, and one of the differences."""
    parts = []
    for metric, (title, digits, best_of) in METRICS.items():
        lines = [line for line in table if line["columns"][metric]]
        if not lines:
            continue
        headings = [h for h in lines[0]["columns"][metric] if all(h in line["columns"][metric] for line in lines)]
        best = {h: best_of(line["columns"][metric][h][0] for line in lines) for h in headings}
        rows = [f"| {title} | seeds | {' | '.join(headings)} |", "|---" * (len(headings) + 2) + "|"]
        for line in lines:
            texts = []
            for h in headings:
                mean, deviation = line["columns"][metric][h]
                text = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if math.isfinite(deviation) else "")
                texts.append(f"**{text}**" if mean == best[h] else text)
            rows.append(f"| `{line['row']}` | {len(line['seeds'])} | {' | '.join(texts)} |")
        parts.append("\n".join(rows))
    if text := difference_table(table):
        parts.append(text)
    seeds = ", ".join(map(str, sorted({seed for line in table for seed in line["seeds"]})))
    return "\n\n".join(parts) + (f"\n\nMeans ± standard deviations over training seeds ({seeds}); ROUGE-L with scoring "
                                 f"seeds {', '.join(map(str, scoring_seeds))}. Brackets: paired bootstrap, 95 %.\n")

def difference_table(table: list[dict]) -> str:
    """Each row minus each baseline, in bits a byte and in ROUGE-L."""
    kinds = [(baseline, heading) for line in table for baseline, of in line["differences"].items() for heading in of]
    columns = [(*kind, metric) for kind in dict.fromkeys(kinds) for metric in ("bits_per_byte", "rouge_l")]
    if not columns:
        return ""
    names = {"bits_per_byte": "bits", "rouge_l": "ROUGE-L"}
    rows = ["| minus | " + " | ".join(f"{b}, {h}: {names[metric]}" for b, h, metric in columns) + " |",
            "|---" * (len(columns) + 1) + "|"]
    for line in table:
        texts = []
        for baseline, heading, metric in columns:
            digits, of = METRICS[metric][1], line["differences"].get(baseline)
            texts.append("{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*of[heading][metric], n=digits) if of else "")
        rows.append(f"| `{line['row']}` | {' | '.join(texts)} |")
    return "\n".join(rows)
