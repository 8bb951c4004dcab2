"""How the course's figures look, and how they get into a notebook.

For: the palette (after Okabe and Ito 2008, so that colour-blind readers keep it apart; line styles, markers or labels
beside it do so on a grey printer), matplotlib's defaults, `show` with an alt text.
Not for: the figures themselves (`plots.py`, `dial_plot.py`).
"""

from __future__ import annotations

import base64
import io

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

BLUE, ORANGE, BLACK, GREEN, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#000000", "#009E73", "#C04F00", "#CC79A7", "#767676",
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


def luminance(colour: object) -> float:
    """Relative luminance, 0 (black) to 1 (white), of any colour matplotlib knows (W3C, WCAG 2.2, section 1.4.3)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: object, second: object) -> float:
    """Contrast of two colours, 1 to 21 (W3C, WCAG 2.2, section 1.4.3, which asks 4.5 for text)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink_on(background: object) -> str:
    """Black or white, whichever is better read on `background`; one of the two always has a contrast of 4.5."""
    return max(("white", BLACK), key=lambda ink: contrast(ink, background))


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
