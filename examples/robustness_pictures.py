"""The pictures of `robustness.py`."""

import io
import pathlib

import numpy as np
from command_line import BLUE, GREEN, ORANGE, PURPLE
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

STYLES = (
    ("black", ":", "D"),
    (ORANGE, "--", "s"),
    (GREEN, "-.", "^"),
    (BLUE, "-", "o"),
)
DIVERGED = 10.0  # a loss; slow weights stay finite where a run has diverged
EMA_STYLE = (PURPLE, "--", "v")
LOSS, ACCURACY = "training loss", "test accuracy, %"


def save(figure: Figure, path: pathlib.Path) -> None:
    """Saves a picture as a PNG."""
    # With 256 colours a picture full of numbers takes a third of the bytes.
    with io.BytesIO() as file:
        figure.savefig(file, dpi=110)
        Image.open(file).convert("RGB").quantize().save(path, optimize=True)


def draw_rates(results, thresholds, rates, momenta) -> Figure:
    """Draws medians over seeds; `results` by data set and method."""
    figure = Figure(figsize=(12, 4.6 * len(results)), layout="constrained")
    rows = figure.subplots(2 * len(results), 2, squeeze=False)
    for i, (name, ends) in enumerate(results.items()):
        for j, method in enumerate(("SGD", "lookahead")):
            loss, accuracy = (np.median(x, axis=-1).T for x in ends[method])
            above, below = rows[2 * i : 2 * i + 2, j]
            draw_heat_map(above, loss, LogNorm(1e-4, 1), "viridis_r", LOSS)
            draw_heat_map(
                below, accuracy, Normalize(50, 100), "cividis", ACCURACY, "{:.0f}"
            )
            for axes, quantity in ((above, LOSS), (below, ACCURACY)):
                outline(axes, accuracy >= thresholds[name])
                axes.invert_yaxis()
                ticks = range(0, len(rates), 3)
                powers = [f"$2^{{{np.log2(rates[i]):.0f}}}$" for i in ticks]
                axes.set_xticks(ticks, powers)
                axes.set_yticks(range(len(momenta)), [f"{x:g}" for x in momenta])
                axes.set_title(f"{name}, {method}: {quantity}")
                axes.set_xlabel("learning rate")
                axes.set_ylabel("momentum")
    limits = ", ".join(f"{name} {thresholds[name]:g} %" for name in results)
    figure.suptitle(
        f"Median over seeds. Hatched: diverged. Outlined: trained ({limits})"
    )
    return figure


def draw_k_alpha(results, ks, alphas) -> Figure:
    """Draws grids `[ks, alphas, seeds]`; `results` by data set and quantity."""
    figure = Figure(figsize=(12, 3.6 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False)
    for row, (name, quantities) in zip(rows, results.items(), strict=True):
        for axes, (quantity, values) in zip(row, quantities.items(), strict=True):
            mean, std = values.mean(axis=-1), values.std(axis=-1)
            colours, text = "cividis", "{:.1f}\n± {:.1f}"
            if LOSS in quantity:
                colours, text = "viridis_r", "{:.2f}\n± {:.2f}"
            draw_heat_map(axes, mean, Normalize(), colours, quantity, text, std)
            axes.set_xticks(range(len(alphas)), [f"{x:g}" for x in alphas])
            axes.set_yticks(range(len(ks)), ks)
            axes.set_title(f"{name}: {quantity}")
            axes.set_xlabel("alpha (1 is the inner optimizer alone)")
            axes.set_ylabel("k")
    figure.suptitle("Mean ± standard deviation over seeds. Hatched: a seed diverged")
    return figure


def draw_heat_map(axes: Axes, values, norm, colours, label, text="", more=None) -> None:
    """Draws a grid, with `text` in its cells, and hatches what is not finite.

    Args:
      axes: Where to draw.
      values: Numbers, shape `[rows, columns]`.
      norm: A Matplotlib norm.
      colours: Name of a colour map.
      label: Name of the numbers.
      text: Format string for a value and the one in `more`.
      more: Numbers of the same shape.
    """
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(shown, norm=norm, cmap=colours, aspect="auto")
    outside = shown.min() < image.norm.vmin, shown.max() > image.norm.vmax
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[outside]
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.01, extend=extend)
    for (y, x), value in np.ndenumerate(values):
        if not np.isfinite(value):
            box = (x - 0.5, y - 0.5), 1, 1
            axes.add_patch(Rectangle(*box, color="0.6", fill=False, hatch="////", lw=0))
            continue
        brightness = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1))
        axes.text(
            *(x, y, text.format(value, None if more is None else more[y, x])),
            color="black" if brightness > 0.5 else "white",
            ha="center",
            va="center",
            fontsize=7,
        )


def outline(axes: Axes, inside: np.ndarray) -> None:
    """Draws a line around the cells of a boolean grid."""
    padded = np.pad(inside, 1)
    for y, x in np.argwhere(np.diff(padded, axis=0)):
        axes.plot([x - 1.5, x - 0.5], [y - 0.5, y - 0.5], color=ORANGE, linewidth=2.5)
    for y, x in np.argwhere(np.diff(padded, axis=1)):
        axes.plot([x - 0.5, x - 0.5], [y - 1.5, y - 0.5], color=ORANGE, linewidth=2.5)


def draw_cycles(results, updates, k: int, rate: float) -> Figure:
    """Draws means over seeds of `[seeds, updates, fast and slow]`, by data set."""
    figure = Figure(figsize=(10.5, 3.4 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False)
    sync = updates % k == 0
    for row, (name, (loss, accuracy)) in zip(rows, results.items(), strict=True):
        quantities = (ACCURACY, accuracy), (LOSS, loss)
        for axes, (quantity, values) in zip(row, quantities, strict=True):
            fast, slow = values.mean(axis=0).T
            axes.plot(updates, fast, color=BLUE, label="fast weights")
            axes.plot(
                *(updates, slow, "--"),
                color=GREEN,
                drawstyle="steps-post",
                label="slow weights",
            )
            axes.plot(updates[sync], slow[sync], "o", color=GREEN, label="sync")
            axes.set_title(f"{name}: {quantity}")
            axes.set_xlabel("update")
            axes.set_ylabel(quantity)
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    figure.suptitle(f"The last cycles, learning rate {rate:g}, mean over seeds")
    return figure


def draw_policies(results, rates) -> Figure:
    """Draws final losses `[rates, seeds]` by data set, inner optimizer and policy."""
    figure = Figure(figsize=(10.5, 3.6 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), len(rates), squeeze=False)
    for row, (name, ends) in zip(rows, results.items(), strict=True):
        for axes, inner in zip(row, rates, strict=True):
            groups = {
                policy: m.loss for (other, policy), m in ends.items() if other == inner
            }
            alone, *policies = STYLES
            styles = alone, EMA_STYLE, *policies
            for (policy, loss), style in zip(groups.items(), styles, strict=True):
                colour, line, marker = style
                middle = np.median(loss, axis=-1)
                in_lookahead = policy not in ("alone", "EMA")
                label = f"in lookahead, {policy}" if in_lookahead else policy
                axes.plot(
                    rates[inner],
                    np.where(middle < DIVERGED, np.maximum(middle, 1e-6), np.nan),
                    color=colour,
                    linestyle=line,
                    marker=marker,
                    markersize=5,
                    label=label,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{name}, {inner}")
            axes.set_xlabel(f"learning rate of {inner}")
            axes.set_ylabel(LOSS)
    figure.legend(
        *rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5
    )
    figure.suptitle(
        "Median over seeds, at least 1e-6. "
        f"No mark where half of them are not below {DIVERGED:g}"
    )
    return figure


def draw_curves(results, every: int) -> Figure:
    """Draws losses `[1, seeds, evaluations, 1]` by data set and method."""
    figure = Figure(figsize=(5.25 * len(results), 4.5), layout="constrained")
    (row,) = figure.subplots(1, len(results), squeeze=False)
    for axes, (name, measured) in zip(row, results.items(), strict=True):
        for (method, (loss, _)), style in zip(measured.items(), STYLES, strict=True):
            colour, line, marker = style
            low, middle, high = np.percentile(loss[0, :, :, 0], [25, 50, 75], axis=0)
            updates = every * np.arange(1, len(middle) + 1)
            axes.plot(
                *(updates, middle),
                color=colour,
                linestyle=line,
                marker=marker,
                markevery=6,
                markersize=5,
                label=method,
            )
            axes.fill_between(updates, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("update")
        axes.set_ylabel(LOSS)
    figure.legend(
        *row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    figure.suptitle("Each tuned on other seeds; median and quartiles of the seeds")
    return figure
