"""Pictures of attention, of keys and queries, and of a run's curves: what probe.py and train.py leave as PNG files.

Notable here: a token is shown with its spaces (␣) and line breaks (↵); the bytes of a character that a tokenizer split
are grouped, <e4 bd>; a character that the font lacks is escaped, \\u4f60."""
import re
import unicodedata
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from files import hub

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
DRAWABLE = set(FT2Font(str(FONT)).get_charmap())
VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}
LONGEST_LABEL, MOST_TOKENS = 18, 120
# the font that ships with matplotlib; a $ in a text is a $
matplotlib.rcParams.update({"font.family": "DejaVu Sans Mono", "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8,
                            "figure.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 7,
                            "text.parse_math": False})
CELL = 0.17                                 # inches a token, so that 8 pt labels do not touch
CHARACTER, LINE = 0.07, 0.16                # inches, of 8 pt

# What --curves draws: panel → names in metrics.jsonl
CURVES = {
    "losses (nats a token)": ("loss", "nll_loss", "kd_loss"),
    "parts of kd_loss (nats a token)": ("t2s_ce_loss", "t2s_kd_loss", "s2t_kd_loss", "byte_loss"),
    "soft-DTW (cosine distance a token)": ("dtw_embed_loss", "dtw_hidden_loss"),
    "first guess right (share of tokens)": ("accuracy", "t2s_acc", "s2t_acc", "max_t2s_prob"),
    "adversary's loss, training batch": ("adversary_key_loss", "adversary_query_loss"),
    "adversary's accuracy, training batch": ("adversary_key_acc", "adversary_query_acc"),
    "attention in the right chunk, dev": ("probe_mass", "probe_hit", "probe_mass_back", "probe_hit_back"),
    "key or query? accuracy, dev (0.5: matched)": ("probe_accuracy", "probe_key_acc", "probe_query_acc"),
    "adversary's loss, dev": ("probe_key_loss", "probe_query_loss"),
    "bits a byte, dev": ("dev_bits_per_byte",), "ROUGE-L × 100, dev": ("dev_rouge_l",),
    "gradient norm": ("grad_norm",),
    "student's learning rate": ("lr",),
}

def token_label(token: bytes) -> str:
    """A token's bytes as a readable label of at most LONGEST_LABEL characters."""
    text = token.decode("utf-8", errors="surrogateescape")              # bytes of a split character: U+DC80 … U+DCFF
    pieces = []
    for part in re.findall(r"[\udc80-\udcff]+|[^\udc80-\udcff]", text):
        if "\udc80" <= part[0] <= "\udcff":
            pieces.append("<" + " ".join(f"{ord(c) - 0xdc00:02x}" for c in part) + ">")
        elif part in VISIBLE:
            pieces.append(VISIBLE[part])
        elif ord(part) in DRAWABLE and unicodedata.category(part)[0] not in "CMZ":      # control, combining, spaces
            pieces.append(part)
        else:
            pieces.append(part.encode("unicode_escape").decode())
    label = "".join(pieces)
    return label if len(label) <= LONGEST_LABEL else label[:LONGEST_LABEL - 1] + "…"

def _grid(count: int, across: int, cell: tuple[float, float]):
    """A figure, and axes for so many panels of a size in inches."""
    across = min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(cell[0] * across, cell[1] * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]

def save(figure: Figure, path: Path, dpi: int = 100) -> Path:
    """Write the picture whole or not at all."""
    with hub.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    return path

# --------------------------------------------------------------------------------------------------------- attention
def _attention(axes, weights: torch.Tensor, blocks: list[tuple[range, range]], width: float, strongest: float):
    """weights (S, T) as shades, of which `strongest` is the darkest, and every chunk's outline."""
    # by the square root of the weight: a twentieth of the strongest is still seen
    image = axes.imshow(weights.numpy(), aspect="equal", interpolation="nearest", cmap="Blues",
                        norm=PowerNorm(0.5, 0, strongest))
    for rows, columns in blocks:
        axes.add_patch(Rectangle((columns.start - 0.5, rows.start - 0.5), len(columns), len(rows), fill=False,
                                 edgecolor="tab:orange", linewidth=width, clip_on=False))
    return image

def _labels(axes, student_labels: list[str], teacher_labels: list[str]) -> None:
    axes.set_yticks(range(len(student_labels)), student_labels)
    axes.set_xticks(range(len(teacher_labels)), teacher_labels, rotation=90)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2)

def heatmap(path: Path, title: str, student_labels: list[str], teacher_labels: list[str],
            panels: dict[str, torch.Tensor], blocks: list[tuple[range, range]]) -> Path:
    """Attention with readable tokens: a row for every student token, a column for every teacher token, chunks outlined.
    panels: heading → weights (S, T), drawn side by side. blocks: (student tokens, teacher tokens) of every chunk. What
    is beyond MOST_TOKENS on a side is left out, and the title says so."""
    whole = len(student_labels), len(teacher_labels)
    student_labels, teacher_labels = student_labels[:MOST_TOKENS], teacher_labels[:MOST_TOKENS]
    rows, columns = len(student_labels), len(teacher_labels)
    if (rows, columns) != whole:
        title += f"\nthe first {rows} of {whole[0]} student tokens, the first {columns} of {whole[1]} teacher tokens"
    blocks = [(a[:max(0, rows - a.start)], b[:max(0, columns - b.start)]) for a, b in blocks]
    cell = max(CELL, 2.4 / max(rows, columns))
    # everything has its place in inches, from the left and from the bottom, so that nothing is cut or covered
    label = [CHARACTER * max(map(len, labels)) + 0.15 for labels in (student_labels, teacher_labels)]
    lines = [text.count("\n") + 1 for text in (title, *panels)]
    slot = max(columns * cell, max(CHARACTER * 1.15 * len(line) for heading in panels for line in heading.split("\n")))
    width = max(0.1 + len(panels) * (label[0] + slot + 0.2) + 1.0,
                CHARACTER * 1.15 * max(map(len, title.split("\n"))) + 0.4)
    bottom, height = LINE * max(lines[1:]) + 0.25, rows * cell
    figure = Figure(figsize=(width, bottom + height + label[1] + LINE * lines[0] + 0.25))

    def place(x, y, w, h):
        return x / width, y / figure.get_figheight(), w / width, h / figure.get_figheight()
    figure.text(0.5, 1 - 0.1 / figure.get_figheight(), title, ha="center", va="top")
    strongest = max(float(weights[:rows, :columns].max()) for weights in panels.values())
    x = 0.1
    for heading, weights in panels.items():
        x += label[0] + slot + 0.2
        axes = figure.add_axes(place(x - 0.2 - (slot + columns * cell) / 2, bottom, columns * cell, height))
        image = _attention(axes, weights[:rows, :columns], [(a, b) for a, b in blocks if a and b], 1.0, strongest)
        _labels(axes, student_labels, teacher_labels)
        axes.set_xlabel(heading)
    bar = figure.add_axes(place(x + 0.1, bottom + max(0.0, height - 3) / 2, 0.15, min(height, 3.0)))
    figure.colorbar(image, cax=bar, ticks=[share * strongest for share in (0, 0.05, 0.2, 0.5, 1)], format="%.2f")
    return save(figure, path, dpi=110)

def contact_sheet(path: Path, samples: list[tuple[str, torch.Tensor, list[tuple[range, range]]]]) -> Path:
    """Many samples' attention, small: (title, weights (S, T), blocks) each."""
    figure, panels = _grid(len(samples), 5, (2.6, 2.8))
    for (title, weights, blocks), axes in zip(samples, panels):
        _attention(axes, weights, blocks, 0.8 if max(weights.shape) <= 40 else 0.3, float(weights.max()))
        axes.set_title(title)
        axes.set(xticks=[], yticks=[])
    return save(figure, path, dpi=130)

# --------------------------------------------------------------------------------------------------- keys and queries
def principal_components(keys: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Keys (N, d) and queries (M, d) in the first two principal components of their union → (N, 2), (M, 2), and the
    share of the union's variance that each of the two components has."""
    union = torch.cat([keys, queries]).double()
    union = union - union.mean(0)
    values, vectors = torch.linalg.eigh(union @ union.T)            # of the points' products: their number, not d
    values, vectors = values[-2:].flip(0).clamp(min=0), vectors[:, -2:].flip(1)
    points = vectors * values.sqrt()
    return points[:len(keys)], points[len(keys):], (values / union.square().sum()).tolist()

def _scatter(axes, title: str, keys: torch.Tensor, queries: torch.Tensor) -> None:
    at_keys, at_queries, shares = principal_components(keys, queries)
    for points, name, colour, marker in ((at_keys, "keys (teacher)", "tab:blue", "o"),
                                         (at_queries, "queries (student)", "tab:red", "x")):
        axes.scatter(*points.numpy().T, s=14, c=colour, marker=marker, alpha=0.5, linewidths=0.8, label=name)
    axes.set_title(title)
    for axis, which, share in zip((axes.xaxis, axes.yaxis), ("first", "second"), shares):
        axis.set_label_text(f"{which} principal component ({100 * share:.0f} % of the variance)")
    axes.legend()

def scatter(path: Path, title: str, keys: torch.Tensor, queries: torch.Tensor) -> Path:
    """Keys (N, d) and queries (M, d) in their union's first two principal components."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    _scatter(figure.subplots(), title, keys, queries)
    return save(figure, path)

def comparison(path: Path, columns: list[dict], over_training: dict[str, list[tuple[int, float]]]) -> Path:
    """Checkpoints side by side, each with: title, keys, queries (absent for an alignment without them), and one
    sample's heading, student_labels, teacher_labels, weights, blocks. over_training: name → (step, how often a probe
    tells keys from queries, in percent), above all else where there are any."""
    rows, teacher_tokens = (max(min(len(c[name]), MOST_TOKENS) for c in columns)
                            for name in ("student_labels", "teacher_labels"))
    size = max(5.5, CELL * teacher_tokens + 1.8), max(3.0, CELL * rows + 1.8)
    top, strongest = 2.5 if over_training else 0.0, max(float(c["weights"].max()) for c in columns)
    figure = Figure(figsize=(len(columns) * size[0], top + 5 + size[1]), layout="constrained")
    whole = figure
    if over_training:
        first, figure = whole.subfigures(2, 1, height_ratios=(top, 5 + size[1]))
        axes = first.subplots()
        for (name, looks), style in zip(over_training.items(), ("-o", "--s")):
            axes.plot(*zip(*looks), style, markersize=3, linewidth=1.2, label=name)
        axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title="key or query? a probe on dev rows that it has not seen, % right (50: nothing tells them apart)",
                 xlabel="step")
        axes.legend()
    grid = figure.subplots(2, len(columns), height_ratios=(5, size[1]), squeeze=False)
    for (above, below), column in zip(grid.T, columns):
        if "queries" in column:
            _scatter(above, column["title"], column["keys"], column["queries"])
        else:
            above.set_title(f"{column['title']}\nno queries: chunks in place of attention")
            above.set_axis_off()
        cut = slice(0, MOST_TOKENS)
        blocks = [(rows, tokens) for rows, tokens in column["blocks"] if max(rows.stop, tokens.stop) <= MOST_TOKENS]
        _attention(below, column["weights"][cut, cut], blocks, 1.0, strongest)
        _labels(below, column["student_labels"][cut], column["teacher_labels"][cut])
        below.set_xlabel(column["heading"])
    return save(whole, path, dpi=110)

# ---------------------------------------------------------------------------------------------------------- next bytes
MOST_CANDIDATES, LIKELY = 24, 0.03          # rows of a panel: bytes that a model gives at least so much anywhere

def next_bytes(path: Path, title: str, text: bytes, panels: dict[str, torch.Tensor],
               divergences: dict[str, torch.Tensor]) -> Path:
    """The next byte that models expect along an answer. text: its bytes, as many as are shown; panels: name → (M, 257),
    M − 1 bytes and EOS, or M bytes; a column is a byte of the text, a row a byte that may come, what does come is
    outlined. divergences: name → KL in bits (M,), as bars below."""
    columns, true = len(next(iter(panels.values()))), [*text, 256]
    together = torch.stack(list(panels.values())).amax((0, 1))
    likely = [c for c in together.argsort(descending=True).tolist() if together[c] >= LIKELY]
    rows = sorted({*likely[:MOST_CANDIDATES], *true[:columns]})
    names = ["EOS" if c == 256 else token_label(bytes([c])) for c in rows]
    height = CELL * len(rows)
    width = max(CELL * columns + 1.6, CHARACTER * 1.15 * max(map(len, title.split("\n"))) + 0.4)
    figure = Figure(figsize=(width, (height + 0.4) * len(panels) + 2.0), layout="constrained")
    figure.suptitle(title)
    *heat, below = figure.subplots(len(panels) + 1, 1, height_ratios=[height] * len(panels) + [1.0], sharex=True)
    for (name, p), axes in zip(panels.items(), heat):
        image = axes.imshow(p[:, rows].T.numpy(), aspect="auto", cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        for column, byte in enumerate(true[:columns]):
            axes.add_patch(Rectangle((column - 0.5, rows.index(byte) - 0.5), 1, 1, fill=False, edgecolor="tab:orange"))
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(length=0)
        axes.set_ylabel(name)
    figure.colorbar(image, ax=heat, ticks=(0, 0.05, 0.2, 0.5, 1), format="%.2f", aspect=40)
    width = 0.8 / len(divergences)
    for i, (name, bits) in enumerate(divergences.items()):
        places = [column + (i - (len(divergences) - 1) / 2) * width for column in range(columns)]
        below.bar(places, bits.tolist(), width, label=name, color=f"C{i}")
    below.set_ylabel("KL (bits)")
    below.set_xticks(range(columns), ["EOS" if c == 256 else token_label(bytes([c])) for c in true[:columns]])
    if len(divergences) > 1:
        below.legend()
    return save(figure, path, dpi=110)

# ------------------------------------------------------------------------------------------------------------- curves
def curves(path: Path, title: str, records: list[dict]) -> Path:
    """The lines of metrics.jsonl over steps, a panel for every group of CURVES that a run has. What comes at every step
    is drawn faintly and, over it, as a running mean over a fiftieth of the run."""
    series = {name: ([r["step"] for r in records if name in r], [r[name] for r in records if name in r])
              for names in CURVES.values() for name in names}
    panels = {heading: [name for name in names if series[name][0]] for heading, names in CURVES.items()}
    panels = {heading: names for heading, names in panels.items() if names}
    figure, grid = _grid(len(panels), 3, (4.6, 3.0))
    figure.suptitle(title)
    for (heading, names), axes in zip(panels.items(), grid):
        for name in names:
            steps, values = series[name]
            often = len(steps) > len(records) // 2 > 0
            window = max(1, len(steps) // 50)
            if often and window > 1:
                line, = axes.plot(steps, values, linewidth=0.5, alpha=0.3)
                smooth = torch.tensor(values).double().unfold(0, window, 1).mean(1)
                axes.plot(steps[window // 2:][:len(smooth)], smooth, color=line.get_color(), linewidth=1.2, label=name)
            else:
                axes.plot(steps, values, linewidth=1.2, label=name, marker="" if often else ".")
        axes.set(title=heading, xlabel="step")
        axes.legend()
    return save(figure, path)

# -------------------------------------------------------------------------------------------------------------- table
def results(path: Path, title: str, scores: dict[str, dict[str, float]]) -> Path:
    """What a run was worth: bits a byte and ROUGE-L of each model, in the order given."""
    figure = Figure(figsize=(7, 0.5 + 0.45 * len(scores)), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(scores)[::-1]
    for axes, metric, label in ((left, "bits_per_byte", "bits a byte (less is better)"),
                                (right, "rouge_l", "ROUGE-L × 100, greedy")):
        values = [scores[name][metric] for name in names]
        shapes = axes.barh(names, values, color=["tab:orange" if name == "student" else "tab:blue" for name in names])
        axes.bar_label(shapes, [f"{value:.3f}" if metric == "bits_per_byte" else f"{value:.1f}" for value in values],
                       padding=3, fontsize=8)
        axes.set_xlim(0, 1.2 * max(values) or 1)
        axes.set_xlabel(label)
    return save(figure, path, dpi=110)

def bars(path: Path, table: list[dict]) -> Path:
    """compare.py's table, bits a byte above ROUGE-L: bars for every column, one for each row, with its deviation over
    training seeds."""
    panels = {"bits_per_byte": "bits a byte", "rouge_l": "ROUGE-L × 100"}
    headings = list(table[0]["columns"]["rouge_l"])
    width = max(6.0, 1.0 + 0.22 * len(headings) * (len(table) + 2))
    figure = Figure(figsize=(width, 8), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(2), panels.items()):
        _bars(axes, [(line["row"], [line["columns"][metric][h] for h in headings]) for line in table])
        axes.set_xticks(range(len(headings)), headings)
        axes.set_ylabel(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)

def _bars(axes, lines: list[tuple[str, list[tuple[float, float]]]]) -> None:
    width = 0.8 / len(lines)
    for i, (name, values) in enumerate(lines):
        means, deviations = zip(*values)
        places = [j + (i - (len(lines) - 1) / 2) * width for j in range(len(values))]
        axes.bar(places, means, width, yerr=deviations, capsize=2, label=name, color=f"C{i % 10}",
                 hatch=(None, "//", "..")[i // 10 % 3], error_kw=dict(linewidth=0.8))
