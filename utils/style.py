"""How the course's figures look, and how they get into a notebook.

For: the palette (a subset of Okabe and Ito 2008 that colour-blind readers and a grey printer keep apart, always with
line styles or markers beside it), matplotlib's defaults, `show` with an alt text.
Not for: the figures themselves (`plots.py`, `dial_plot.py`).
"""

from __future__ import annotations

import base64
import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, BLACK, GREEN, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#000000", "#009E73", "#D55E00", "#CC79A7", "#767676",
)  # fmt: skip

STYLES: dict[str, tuple[str, str, str]] = {  # method -> colour, marker, line style
    "ia3": (BLUE, "o", "-"),
    "ia3_kv": (BLUE, "d", (0, (1, 1))),
    "lora": (ORANGE, "s", "--"),
    "full": (BLACK, "D", "-."),
    "bitfit": (GREEN, "^", ":"),
    "prefix": (PURPLE, "v", (0, (5, 1))),
    "bottleneck": (RED, "P", (0, (3, 1, 1, 1))),
    "base": (GREY, "x", ":"),
}

WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}  # behind a label that may cross a line


def apply_style() -> None:
    """Set matplotlib's defaults for the course: notebook width (8 x 4 inches, 100 dpi), light grid, no box."""
    plt.rcParams.update(
        {
            "figure.figsize": (8, 4),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E3E3E3",
            "legend.frameon": False,
            "lines.linewidth": 2,
        }
    )


def show(figure: Figure, alt: str) -> None:
    """Put `figure` into the notebook as a PNG with `alt` text (which nbconvert keeps), and close it."""
    from IPython.display import display

    if not alt.strip():
        raise ValueError("a figure needs an alt text: one sentence that says what it shows")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same bytes from every matplotlib
    plt.close(figure)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    display({"image/png": png, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})


def new_axes(ax: Axes | None, **options: object) -> Axes:
    """`ax`, or the axes of a new figure in the course's style."""
    if ax is not None:
        return ax
    apply_style()
    return plt.subplots(**options)[1]
