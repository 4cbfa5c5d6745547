"""Train a small Flax NNX language model with AdamW, with and without lookahead.

A causal transformer learns, byte by byte, the English text that ships with Python: the
help topics of `pydoc`, the last tenth of which is held out. The same `nnx.Optimizer`
loop runs AdamW alone, AdamW with a moving average (EMA) of its weights, which is the
control, and AdamW inside `lookahead`, with the same number of steps and the same grid
of learning rates for all, over several seeds. It prints the held-out losses of the fast
and of the slow or averaged weights, samples a text from the slow weights, and draws the
losses.

    python examples/nnx_language_model.py
    python examples/nnx_language_model.py --decay
    python examples/nnx_language_model.py --steps 5000 --width 256 --context 256
"""

import argparse
import functools
import math
import pathlib
import sys
import textwrap
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import numpy as np
import optax
from command_line import BLUE, GREEN, ORANGE, PURPLE, Parser
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from optax_lookahead import lookahead, primal_averaging, slow_params

EVALUATIONS = 8  # in a run
HEADS = 4
HELD_OUT = 16_384  # bytes to predict in an evaluation, rounded to whole windows
SAMPLE = 300  # bytes
TEMPERATURE = 0.7


class Text(NamedTuple):
    """Bytes of the training and of the held-out text, shape `[n]`."""

    train: np.ndarray
    held_out: np.ndarray


class Run(NamedTuple):
    """Results of one run, for the fast and for the slow or averaged weights."""

    updates: np.ndarray  # after which the losses were taken, [n]
    losses: np.ndarray  # held out, [n, 1 or 2]
    final: float  # held-out loss of `model`
    model: nnx.Module  # after the last update, with the weights to evaluate


def load_text() -> Text:
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    # Without repeats, since topics quote each other and the held-out part must be new,
    # and without tables, which are mostly blanks.
    kept = dict.fromkeys(p for p in paragraphs if "--+" not in p and " | " not in p)
    text = "\n\n".join(kept).encode()
    return Text(*np.split(np.frombuffer(text, np.uint8), [len(text) * 9 // 10]))


def windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """Returns windows of context + 1 bytes, since targets are one byte ahead."""
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def held_out_windows(text: Text, context: int) -> np.ndarray:
    last, count = len(text.held_out) - context - 1, math.ceil(HELD_OUT / context)
    return windows(text.held_out, np.linspace(0, last, count, dtype=int), context)


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=width, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    def __init__(self, width: int, depth: int, context: int, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(width, rngs) for _ in range(depth)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens):
        x = self.bytes(tokens) + self.positions(np.arange(tokens.shape[-1]))
        return self.head(self.norm(self.blocks(x)))


def loss_fn(model, tokens):
    """Mean cross entropy in nats per byte."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


evaluate = nnx.jit(loss_fn)


@nnx.jit
def train_step(model, optimizer, tokens):
    """A training step for any optimizer."""
    grads = nnx.grad(loss_fn)(model, tokens)
    optimizer.update(model, grads)


@nnx.jit
def next_byte(model, tokens, last, key):
    logits = model(tokens[None])[0, last]
    return jax.random.categorical(key, logits / TEMPERATURE)


def with_ema(inner, decay):
    """Trains as `inner` does; `slow_params` returns the moving average of the weights.

    With `mu_y=0` the gradient is taken at the weights, not at their average.
    """
    return optax.chain(inner, primal_averaging(mu_x=decay, mu_y=0.0))


def with_slow_weights(model, optimizer):
    """Returns a copy of the model that holds the slow, or the averaged, weights."""
    slow = slow_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    copy = nnx.clone(model)
    nnx.update(copy, slow)
    return copy


def fast_model(model, optimizer):
    del optimizer  # only the model's own weights are evaluated
    return [model]


def fast_and_slow_model(model, optimizer):
    return [model, with_slow_weights(model, optimizer)]


def train(tx, models, seed: int, text: Text, args: argparse.Namespace, bar) -> Run:
    """Trains once; `models(model, optimizer)` returns the models to evaluate."""
    model = LanguageModel(args.width, args.depth, args.context, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    held_out = held_out_windows(text, args.context)
    # One update before a sync, where fast and slow weights differ most.
    cycles = np.linspace(0, args.steps // args.k, EVALUATIONS + 1)[1:].astype(int)
    updates = np.unique(cycles[cycles > 0]) * args.k - 1
    losses = []
    # Traverses the modules once rather than at every call.
    step = nnx.cached_partial(train_step, model, optimizer)
    for update in range(args.steps):
        if update in updates:
            trained = models(model, optimizer)
            losses.append([evaluate(weights, held_out) for weights in trained])
        starts = rng.integers(len(text.train) - args.context, size=args.batch)
        step(windows(text.train, starts, args.context))
        if update == 0:
            bar.unpause()  # leaves the time to compile out of the estimate
        bar.update()
    model = models(model, optimizer)[-1]
    return Run(updates, np.array(losses), float(evaluate(model, held_out)), model)


def make_adamw(rate: float, args: argparse.Namespace) -> optax.GradientTransformation:
    warm_up = warm_up_updates(args)
    if args.decay:
        steps = max(args.steps, warm_up + 1)
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, steps)
    else:
        schedule = optax.warmup_constant_schedule(0.0, rate, warm_up)
    return optax.adamw(schedule)


def warm_up_updates(args: argparse.Namespace) -> int:
    return max(1, args.steps // 10)


def train_all(text: Text, args: argparse.Namespace) -> dict[tuple[str, float], list]:
    """Returns the runs over seeds by wrapper and learning rate."""
    wrappers = {
        "alone": (lambda inner: inner, fast_model),
        "EMA": (functools.partial(with_ema, decay=args.ema), fast_and_slow_model),
        "lookahead": (
            functools.partial(lookahead, k=args.k, alpha=args.alpha),
            fast_and_slow_model,
        ),
    }
    runs = {}
    total = len(wrappers) * len(args.rates) * args.seeds * args.steps
    with tqdm(total=total, unit="step", smoothing=0) as bar:
        for wrapper, (wrap, models) in wrappers.items():
            for rate in args.rates:
                bar.set_description(f"AdamW, {rate:g}, {wrapper}")
                tx = wrap(make_adamw(rate, args))
                runs[wrapper, rate] = [
                    train(tx, models, seed, text, args, bar)
                    for seed in range(args.seeds)
                ]
    return runs


def final_losses(group: list[Run]) -> np.ndarray:
    return np.array([run.final for run in group])


def best_rate(runs, wrapper: str, args: argparse.Namespace) -> float:
    def loss(rate: float) -> float:
        # A run that diverged counts as the worst.
        return np.nan_to_num(final_losses(runs[wrapper, rate]).mean(), nan=math.inf)

    return min(args.rates, key=loss)


def print_table(runs, args: argparse.Namespace) -> None:
    def cell(values, mark: str = "") -> str:
        return f"{np.mean(values):.3f} ± {np.std(values):.3f}{mark:<2}"

    best = {wrapper: best_rate(runs, wrapper, args) for wrapper, _ in runs}
    schedule = "cosine decay to zero" if args.decay else "constant"
    print(
        f"\n{args.steps} updates of {args.batch} x {args.context} bytes, warm-up of "
        f"{warm_up_updates(args)}, then {schedule}; k = {args.k}, alpha = "
        f"{args.alpha:g}; EMA with decay {args.ema:g}.\nHeld-out loss in nats per "
        f"byte: mean ± standard deviation over {args.seeds} seeds.\n"
        f"Grid of learning rates, the same for all: {grid(args)}.\n"
        "Before a sync: one update before the last sync, where fast and slow weights "
        "differ most.\nAt the end: after the last update, for the slow weights or the "
        "EMA if there are any;\n* marks the best.\n"
    )
    row = "{:<11}{:<15}{:>21}{:>21}{:>18}"
    fast, slow = "fast, before a sync", "slow, before a sync"
    print(row.format("wrapper", "learning rate", fast, slow, "at the end  ").rstrip())
    for (wrapper, rate), group in runs.items():
        cells = [cell(values) for values in np.transpose([r.losses[-1] for r in group])]
        none = ["-  "] if wrapper == "alone" else []
        mark = " *" if rate == best[wrapper] else ""
        final = cell(final_losses(group), mark)
        print(row.format(wrapper, f"{rate:g}", *cells, *none, final).rstrip())
    print_verdict(runs, best, args)


def grid(args: argparse.Namespace) -> str:
    return ", ".join(f"{rate:g}" for rate in args.rates)


def print_verdict(runs, best: dict[str, float], args: argparse.Namespace) -> None:
    finals = {wrapper: final_losses(runs[wrapper, best[wrapper]]) for wrapper in best}
    print("\nEach at its best rate:")
    for other in ("alone", "EMA"):
        # Paired: a seed has the same initial weights and batches.
        pairs = finals["lookahead"] - finals[other]
        print(
            f"lookahead minus {other}, seed by seed: "
            f"{pairs.mean():+.3f} ± {pairs.std():.3f}"
        )
    for wrapper, rate in best.items():
        if rate in (args.rates[0], args.rates[-1]):
            print(f"The best rate of {wrapper} is at an edge of the grid: try --rates.")


def print_sample(model, context: int) -> None:
    text = list(b"A function is ")
    key = jax.random.key(0)
    for place in tqdm(range(SAMPLE), desc="sample", unit="byte", leave=False):
        recent = text[-context:]
        tokens = np.zeros(
            context, np.int32
        )  # causal: the zeros after the text have no effect
        tokens[: len(recent)] = recent
        last = np.int32(len(recent) - 1)
        text.append(int(next_byte(model, tokens, last, jax.random.fold_in(key, place))))
    print("\nThe slow weights of the best rate, seed 0, write:\n")
    # A model that has learnt little also writes control characters.
    shown = (chr(i) if 32 <= i < 127 or i == 10 else "?" for i in text)
    print(textwrap.indent("".join(shown).rstrip(), "    "))


def draw(runs, args: argparse.Namespace) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    curves, rates = figure.subplots(1, 2)
    draw_curves(curves, runs, args)
    draw_rates(rates, runs, args)
    schedule = "cosine decay" if args.decay else "constant rate"
    figure.suptitle(
        f"Byte-level transformer on Python's help, {schedule} after warm-up, "
        f"k = {args.k}, alpha = {args.alpha:g}, EMA of decay {args.ema:g},\n"
        f"{args.seeds} seeds (mean ± std)"
    )
    figure.savefig(args.out, dpi=110)


def draw_curves(axes, runs, args: argparse.Namespace) -> None:
    for wrapper, column, colour, style, label in (
        ("alone", 0, ORANGE, "s-", "alone"),
        ("EMA", 1, PURPLE, "D-.", "EMA"),
        ("lookahead", 0, BLUE, "^--", "lookahead, fast"),
        ("lookahead", 1, GREEN, "o-", "lookahead, slow"),
    ):
        rate = best_rate(runs, wrapper, args)
        group = runs[wrapper, rate]
        losses = np.array([run.losses[:, column] for run in group])
        mean, std, updates = losses.mean(0), losses.std(0), group[0].updates
        axes.plot(updates, mean, style, color=colour, label=f"{label}, rate {rate:g}")
        axes.fill_between(
            updates, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0
        )
    axes.set_title("Each at its best rate, one update before a sync")
    axes.set_xlabel("update")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend()


def draw_rates(axes, runs, args: argparse.Namespace) -> None:
    for wrapper, colour, style, label in (
        ("alone", ORANGE, "s-", "alone"),
        ("EMA", PURPLE, "D-.", "EMA"),
        ("lookahead", GREEN, "o-", "lookahead, slow"),
    ):
        losses = np.array([final_losses(runs[wrapper, rate]) for rate in args.rates])
        axes.errorbar(
            args.rates,
            losses.mean(axis=1),
            losses.std(axis=1),
            fmt=style,
            color=colour,
            label=label,
            capsize=4,
        )
    axes.set_xscale("log")
    axes.set_xticks(args.rates, [f"{rate:g}" for rate in args.rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"After the last of {args.steps} updates")
    axes.set_xlabel("learning rate of AdamW")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend()


def parse_args(argv: list[str], text: Text) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--k", type=int, default=5, help="updates in a cycle")
    parser.add_argument("--alpha", type=float, default=0.5, help="slow step size")
    parser.add_argument(
        "--ema", type=float, default=0.98, help="decay of the EMA, the control"
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.0025, 0.005, 0.01, 0.02],
        help="learning rates to try, the same for all",
    )
    parser.add_argument(
        "--decay", action="store_true", help="cosine decay after the warm-up"
    )
    parser.add_argument("--width", type=int, default=64, help="of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="transformer blocks")
    parser.add_argument("--context", type=int, default=32, help="bytes in a window")
    parser.add_argument("--batch", type=int, default=16, help="windows in an update")
    parser.add_argument(
        "--out", type=pathlib.Path, default="nnx_language_model.png", help="a PNG"
    )
    args = parser.parse_args(argv)
    check_sizes_and_rates(parser, args)
    try:
        lookahead(optax.identity(), args.k, args.alpha)
    except ValueError as error:
        parser.error(str(error))
    if not 0 <= args.ema < 1:
        parser.error(f"--ema must be in [0, 1), got {args.ema:g}.")
    if args.steps < args.k:
        parser.error(f"--steps must be at least k = {args.k}, got {args.steps}.")
    if args.context >= len(text.held_out):
        parser.error(
            f"--context must be less than the {len(text.held_out)} bytes of held-out "
            f"text, got {args.context}."
        )
    return args


def check_sizes_and_rates(parser: Parser, args: argparse.Namespace) -> None:
    """Checks the arguments that `outer_optimizers.py` has too, and sorts the rates."""
    parser.check_counts(args, "seeds", "width", "depth", "context", "batch")
    if not all(0 < rate < math.inf for rate in args.rates):
        parser.error(f"--rates must be positive and finite, got {grid(args)}.")
    if args.width % HEADS:
        parser.error(f"--width must be a multiple of {HEADS} heads, got {args.width}.")
    parser.check_picture(args.out)
    args.rates = sorted(set(args.rates))


def main() -> None:
    text = load_text()
    args = parse_args(sys.argv[1:], text)
    runs = train_all(text, args)
    print_table(runs, args)
    draw(runs, args)
    best = best_rate(runs, "lookahead", args)
    print_sample(runs["lookahead", best][0].model, args.context)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()
