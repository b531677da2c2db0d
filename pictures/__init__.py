"""PNG files: what a run was worth, and what its attention aligns."""

import matplotlib
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


def save(figure: Figure, path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
