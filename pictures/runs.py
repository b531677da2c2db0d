"""Pictures of a run: the models' scores, the curves of metrics.jsonl."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from runtime.files import atomic_path

# The font comes with matplotlib; a $ in a text is a $.
matplotlib.rcParams.update(
    {
        "font.family": "DejaVu Sans Mono",
        "font.size": 8,
        "axes.titlesize": 9,
        "figure.titlesize": 9,
        "legend.fontsize": 7,
        "text.parse_math": False,
    }
)


def save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


# panel → names in metrics.jsonl
CURVES = {
    "losses (nats per token)": ("loss", "nll_loss", "kd_loss"),
    "terms of kd_loss (nats per token)": ("t2s_ce_loss", "t2s_kd_loss", "s2t_kd_loss"),
    "soft-DTW (cosine distance per token)": ("dtw_embed_loss", "dtw_hidden_loss"),
    "likeliest token is right (share of tokens)": ("accuracy", "t2s_acc", "s2t_acc", "teacher_acc"),
    "adversary's loss": ("adversary_key_loss", "adversary_query_loss"),
    "adversary's accuracy": ("adversary_key_acc", "adversary_query_acc"),
    "bits per byte, dev": ("dev_bits_per_byte",),
    "ROUGE-L × 100, dev": ("dev_rouge_l",),
    "gradient norm": ("grad_norm",),
    "student's learning rate": ("lr",),
}


def results(path: Path, title: str, scores: dict[str, dict[str, float]]) -> None:
    """Bits per byte and ROUGE-L of each model, in the order given."""
    figure = Figure(figsize=(7, 0.5 + 0.45 * len(scores)), layout="constrained")
    figure.suptitle(title)
    names = list(scores)[::-1]
    colours = ["tab:orange" if name == "student" else "tab:blue" for name in names]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, metric, digits in ((left, "bits_per_byte", 3), (right, "rouge_l", 1)):
        if metric not in scores[names[0]]:
            axes.set_axis_off()
            continue
        values = [scores[name][metric] for name in names]
        shapes = axes.barh(names, values, color=colours)
        axes.bar_label(shapes, [f"{value:.{digits}f}" for value in values], padding=3)
        axes.set_xlim(0, 1.2 * max(values) or 1)
    left.set_xlabel("bits per byte (less is better)")
    right.set_xlabel("ROUGE-L × 100")
    save(figure, path)


def curves(path: Path, title: str, records: list[dict]) -> None:
    """The lines of metrics.jsonl over steps, a panel for every group of CURVES that a run has. What
    every step has is drawn faintly and, over it, as a running mean over a fiftieth of the run."""
    panels = {}
    for heading, names in CURVES.items():
        lines = {}
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if len(points) > 1:
                lines[name] = points
        if lines:
            panels[heading] = lines
    if not panels:
        return
    num_rows = (len(panels) + 2) // 3
    figure = Figure(figsize=(13.8, 3.0 * num_rows), layout="constrained")
    figure.suptitle(title)
    grid = list(figure.subplots(num_rows, 3, squeeze=False).flat)
    for (heading, lines), axes in zip(panels.items(), grid):
        for name, points in lines.items():
            steps, values = zip(*points)
            window = len(steps) // 50
            if window > 1:
                (line,) = axes.plot(steps, values, linewidth=0.5, alpha=0.3)
                means = torch.tensor(values).double().unfold(0, window, 1).mean(1)
                middles = steps[window // 2 :][: len(means)]
                axes.plot(middles, means, color=line.get_color(), linewidth=1.2, label=name)
            else:
                axes.plot(steps, values, ".-", linewidth=1.2, label=name)
        axes.set(title=heading, xlabel="step")
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    save(figure, path)
