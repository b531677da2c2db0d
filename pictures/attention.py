"""Pictures of attention, of keys and queries, and of next bytes.

A token is shown with its spaces (␣) and line breaks (↵); the bytes of a character that a tokenizer
split are grouped, <e4 bd>; a character that the font lacks is escaped, \\u4f60."""

import re
import unicodedata
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from pictures.runs import save

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
DRAWABLE = set(FT2Font(str(FONT)).get_charmap())
VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}
LONGEST_LABEL, MAX_TOKENS = 18, 100
CELL = 0.17  # inches per token, so that labels do not touch
MAX_CANDIDATES, LIKELY = 24, 0.03  # rows of next_bytes: what a model gives at least so much


def token_label(token: bytes) -> str:
    """A token's bytes as a readable label of at most LONGEST_LABEL characters."""
    text = token.decode("utf-8", errors="surrogateescape")  # split characters: U+DC80 … U+DCFF
    label = ""
    for part in re.findall(r"[\udc80-\udcff]+|[^\udc80-\udcff]", text):
        if "\udc80" <= part[0] <= "\udcff":
            label += "<" + " ".join(f"{ord(c) - 0xdc00:02x}" for c in part) + ">"
        elif part in VISIBLE:
            label += VISIBLE[part]
        elif ord(part) in DRAWABLE and unicodedata.category(part)[0] not in "CMZ":
            label += part
        else:
            label += part.encode("unicode_escape").decode()
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def heatmaps(
    path: Path,
    title: str,
    student_labels: list[str],
    teacher_labels: list[str],
    panels: dict[str, torch.Tensor],
    same_chunk: torch.Tensor,
) -> None:
    """Attention with readable tokens: a row per student token, a column per teacher token, chunks
    outlined. panels: heading → weights (S, T), side by side."""
    student_labels, teacher_labels = student_labels[:MAX_TOKENS], teacher_labels[:MAX_TOKENS]
    rows, columns = len(student_labels), len(teacher_labels)
    size = max(3.2, CELL * columns + 2.0), max(3.0, CELL * rows + 2.2)
    figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
    figure.suptitle(title)
    strongest = max(float(weights[:rows, :columns].max()) for weights in panels.values())
    for axes, (heading, weights) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items()
    ):
        # By the square root of the weight: a twentieth of the strongest is still visible.
        image = axes.imshow(
            weights[:rows, :columns].numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, strongest)
        )
        for i, j in same_chunk[:rows, :columns].nonzero().tolist():
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="tab:orange"))
        axes.set_yticks(range(rows), student_labels)
        axes.set_xticks(range(columns), teacher_labels, rotation=90)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_xlabel(heading)
    figure.colorbar(image, ax=axes, shrink=0.6)
    save(figure, path)


def principal_components(keys: torch.Tensor, queries: torch.Tensor):
    """Keys (N, d) and queries (M, d) in the first two principal components of their union
    → (N, 2), (M, 2), and each component's share of the variance."""
    union = torch.cat([keys, queries]).double()
    union = union - union.mean(0)
    U, S, _ = torch.linalg.svd(union, full_matrices=False)
    points = U[:, :2] * S[:2]
    shares = S[:2].square() / S.square().sum()
    return points[: len(keys)], points[len(keys) :], shares.tolist()


def scatters(path: Path, panels: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """heading → (keys, queries), side by side."""
    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    for axes, (heading, (keys, queries)) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels.items()
    ):
        key_points, query_points, shares = principal_components(keys, queries)
        axes.scatter(*key_points.T, s=14, c="tab:blue", alpha=0.5, label="keys (teacher)")
        axes.scatter(
            *query_points.T, s=14, c="tab:red", marker="x", alpha=0.5, label="queries (student)"
        )
        axes.set(
            title=heading,
            xlabel=f"first principal component ({100 * shares[0]:.0f} % of the variance)",
            ylabel=f"second principal component ({100 * shares[1]:.0f} %)",
        )
        axes.legend()
    save(figure, path)


def next_bytes(
    path: Path,
    title: str,
    text: bytes,
    panels: dict[str, torch.Tensor],
    divergences: dict[str, torch.Tensor],
) -> None:
    """The next byte that models expect along an answer.

    panels: name → (M, 257); a column is a byte of the text, the last one EOS, a row a byte that may
    come; what does come is outlined. divergences: name → KL in bits (M,), as bars below."""
    true = [*text, 256]
    columns = len(next(iter(panels.values())))
    together = torch.stack(list(panels.values())).amax((0, 1))
    likely = [c for c in together.argsort(descending=True).tolist() if together[c] >= LIKELY]
    rows = sorted({*likely[:MAX_CANDIDATES], *true[:columns]})
    names = {c: "EOS" if c == 256 else token_label(bytes([c])) for c in {*rows, *true}}
    height = CELL * len(rows)
    figure = Figure(
        figsize=(max(6.0, CELL * columns + 2.0), (height + 0.4) * len(panels) + 2.0),
        layout="constrained",
    )
    figure.suptitle(title)
    *heat, below = figure.subplots(
        len(panels) + 1, 1, sharex=True, height_ratios=[height] * len(panels) + [1.0]
    )
    for axes, (name, p) in zip(heat, panels.items()):
        axes.imshow(p[:, rows].T.numpy(), aspect="auto", cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        for column, byte in enumerate(true[:columns]):
            axes.add_patch(
                Rectangle(
                    (column - 0.5, rows.index(byte) - 0.5), 1, 1, fill=False, edgecolor="tab:orange"
                )
            )
        axes.set_yticks(range(len(rows)), [names[c] for c in rows])
        axes.tick_params(length=0)
        axes.set_ylabel(name)
    width = 0.8 / len(divergences)
    for i, (name, bits) in enumerate(divergences.items()):
        places = [column - 0.4 + (i + 0.5) * width for column in range(columns)]
        below.bar(places, bits.tolist(), width, label=name)
    below.set_ylabel("KL (bits)")
    below.set_xticks(range(columns), [names[c] for c in true[:columns]])
    below.legend()
    save(figure, path)
