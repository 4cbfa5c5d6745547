"""Train the Lookahead paper's ResNet-18 on CIFAR-10 or CIFAR-100.

The setting of the paper's table 1: the ResNet-18 of the Cutout repository (3x3 stem,
64 to 512 channels, 11.17 million parameters), batches of 128, 200 epochs, learning rate
times 0.2 after 60, 120 and 160 of them, images padded by 4, cropped and flipped, and

    sgd        rate 0.05, momentum 0.9, weight decay 1e-3
    adam       AdamW, rate 3e-4, weight decay 1 (times the rate)
    lookahead  k = 5, alpha = 0.8 around that SGD at rate 0.1

Published final test accuracies in %:

                  sgd            adam           lookahead
    CIFAR-10      95.23 ± 0.19   94.84 ± 0.16   95.27 ± 0.06
    CIFAR-100     78.24 ± 0.18   76.88 ± 0.39   78.34 ± 0.05

Lookahead's means are within a standard deviation of SGD's. Its spread is smaller, which
a single seed cannot show.

This script has not been run on CIFAR yet, only with narrow networks on small archives
in the same format, such as one of scikit-learn's digits. A run at full size takes
2.9e16 floating-point operations (as XLA counts them), so use an accelerator. The data
are the python versions at https://www.cs.toronto.edu/~kriz/cifar.html, as downloaded:

    python examples/cifar10.py --data cifar-10-python.tar.gz
    python examples/cifar10.py --data cifar-100-python.tar.gz --seed 1 \
        --optimizer sgd adam lookahead --checkpoint runs

With `--checkpoint` a run that was stopped continues after its last whole epoch. All
devices of the process train together, each on its part of every batch; BatchNorm takes
its statistics over the whole batch, on any number of devices. On GPUs and TPUs the
network computes in bfloat16, with weights, statistics and optimizer in float32.

BatchNorm's running statistics lag behind the weights, and in lookahead they belong to
the fast weights. So each evaluation first measures statistics on training images, with
the weights that are evaluated; also for SGD and Adam. The table at the end also has
accuracies with the running statistics, which PyTorch code uses: the optimizer that the
authors published swaps only the weights.
"""

import argparse
import functools
import hashlib
import io
import math
import pathlib
import pickle
import sys
import tarfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from command_line import BLUE, GREEN, ORANGE, Parser
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from optax_lookahead import lookahead, slow_params

URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
MD5 = {10: "c58f30108f718f92721af3b95e74349a", 100: "eb9058c3a382ffc7106e4002c42a8d85"}
TRAIN = {10: [f"data_batch_{i}" for i in range(1, 6)], 100: ["train"]}
TEST = {10: ["test_batch"], 100: ["test"]}
LABELS = {10: b"labels", 100: b"fine_labels"}
STYLES = {"sgd": (ORANGE, "--"), "adam": (GREEN, ":"), "lookahead": (BLUE, "-")}
MEASURED = 50  # batches, for the BatchNorm statistics of an evaluation


class Data(NamedTuple):
    # Images as in the archive, uint8 [n, 3072], a plane of 32 x 32 for each colour. If
    # they were [n, 32, 32, 3], a TPU would copy all of them to take a batch.
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    md5: str


class ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain Python values; other pickles could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1: real archives
            ("numpy._core.multiarray", "_reconstruct"),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_archive(path: pathlib.Path) -> Data:
    """Reads CIFAR-10 or CIFAR-100; raises a ValueError with a message of one line."""
    wanted = {name for names in (*TRAIN.values(), *TEST.values()) for name in names}
    members = {}
    try:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        with tarfile.open(path) as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if member.isfile() and name in wanted:
                    members[name] = archive.extractfile(member).read()
    except FileNotFoundError:
        raise ValueError(
            f"no {path}: get cifar-10-python.tar.gz (or cifar-100-python.tar.gz) at "
            f"{URL} and name it with --data."
        ) from None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        problem = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{path} is not a whole tar archive ({problem}).") from None
    classes = 100 if "train" in members else 10
    arrays = []
    for names in (TRAIN[classes], TEST[classes]):
        if not members.keys() >= set(names):
            missing = min(set(names) - members.keys())
            raise ValueError(
                f"{path} has no {missing}: it must be the python version of CIFAR-10 "
                f"or CIFAR-100 from {URL}."
            )
        parts = [read_batch(members[n], classes, f"{path}: {n}") for n in names]
        arrays += map(np.concatenate, zip(*parts, strict=True))
    return Data(*arrays, classes, md5)


def read_batch(content: bytes, classes: int, name: str):
    try:
        # Python 2 wrote them, so their strings are bytes.
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[LABELS[classes]])
    except Exception as error:  # a damaged pickle can raise any exception
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} is not a batch of images ({problem}).") from None
    if x.dtype != np.uint8 or x.shape[1:] != (3072,):
        raise ValueError(f"{name} must hold uint8 images of 3072 values each.")
    if not y.size or y.shape != x.shape[:1] or not np.isin(y, range(classes)).all():
        raise ValueError(f"{name} must hold a label of 0 to {classes - 1} per image.")
    return x, y.astype(np.int32)


class Block(nn.Module):
    width: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.width, (3, 3), self.strides)(x)
        y = self.conv(self.width, (3, 3))(nn.relu(self.norm()(y)))
        y = self.norm()(y)
        if x.shape != y.shape:
            x = self.norm()(self.conv(self.width, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """The ResNet-18 of the Cutout repository, with PyTorch's defaults that matter.

    Its weights start with a third of the variance that Flax would give them. Due to
    BatchNorm this does not change what the network computes, but it does change the
    size of a step relative to the weights. (Unlike in PyTorch, the biases of the last
    layer start at zero.)
    """

    classes: int
    width: int = 64
    dtype: Any = jnp.float32
    momentum: float = 0.9  # of the running statistics; 0 keeps the last batch's

    @nn.compact
    def __call__(self, x, train: bool):
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def conv(width, kernel, strides=1):
            return nn.Conv(
                *(width, kernel, strides),
                padding=kernel[0] // 2,  # "SAME" pads one side only if strides are 2
                use_bias=False,
                dtype=self.dtype,
                kernel_init=kernel_init,
            )

        def norm():
            return nn.BatchNorm(not train, momentum=self.momentum, dtype=self.dtype)

        x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
        for stage in range(4):
            for strides in (2 if stage else 1, 1):
                x = Block(self.width * 2**stage, strides, conv, norm)(x)
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        return nn.Dense(self.classes, kernel_init=kernel_init)(x)


class State(TrainState):
    batch_stats: Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def create_state(model: nn.Module, tx: optax.GradientTransformation, key) -> State:
    variables = model.init(key, jnp.zeros((1, 32, 32, 3)), train=True)
    return State.create(apply_fn=None, tx=tx, **variables)


def make_optimizer(name: str, updates: int) -> optax.GradientTransformation:
    """Returns the paper's setting for a training run of this many updates."""

    def rate(start: float) -> optax.Schedule:
        drops = {updates * tenths // 10: 0.2 for tenths in (3, 6, 8)}
        return optax.piecewise_constant_schedule(start, drops)

    def sgd(start: float) -> optax.GradientTransformation:
        # As in PyTorch: all parameters decay, and the decay is part of the momentum.
        return optax.chain(
            optax.add_decayed_weights(1e-3), optax.sgd(rate(start), momentum=0.9)
        )

    if name == "lookahead":
        return lookahead(sgd(0.1), k=5, alpha=0.8)
    if name == "adam":
        return optax.adamw(rate(3e-4), weight_decay=1.0)
    return sgd(0.05)


def augment(images, key):
    """Pads by four black pixels, crops at random, and flips half of the images."""
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 9)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (32, 32, 3))

    images = jax.vmap(crop)(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def shuffled(images: int, batch: int, *seed: int) -> np.ndarray:
    """Returns the images of each batch; the last is filled up with the first ones."""
    order = np.random.default_rng(seed).permutation(images)
    return np.resize(order, (math.ceil(images / batch), batch))


def mean_and_std(x: np.ndarray) -> list[np.ndarray]:
    """Returns mean and standard deviation of each channel, to broadcast over images."""
    planes = np.split(x, 3, axis=1)
    return [
        np.float32([stat(plane) for plane in planes]).reshape(1, 1, 1, 3)
        for stat in (np.mean, np.std)
    ]


class Programs(NamedTuple):
    """Programs of the devices; `x` are all images, `rows` the indices of a batch."""

    update: Callable  # (state, x, y, rows, key) to the state and the loss
    measure: Callable  # (params, x, rows, key) to this batch's BatchNorm statistics
    predict: Callable  # (params, batch_stats, x, rows) to classes


def make_programs(model, mesh: Mesh, mean, std) -> Programs:
    """Returns the programs for a mesh with the one axis "data"."""
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def load(x, rows, key=None):
        x = x[jax.lax.with_sharding_constraint(rows, split)]
        images = x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        images = images if key is None else augment(images, key)
        return (images - mean) / std

    def update(state, x, y, rows, key):
        images = load(x, rows, jax.random.fold_in(key, state.step))

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, changed = model.apply(
                variables, images, True, mutable="batch_stats"
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
            return loss.mean(), changed

        (loss, changed), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, **changed), loss

    def measure(params, x, rows, key):
        # Without momentum the running statistics are those of the batch.
        _, changed = model.clone(momentum=0.0).apply(
            {"params": params}, load(x, rows, key), True, mutable="batch_stats"
        )
        return changed["batch_stats"]

    def predict(params, batch_stats, x, rows):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, load(x, rows), False).argmax(-1)

    return Programs(
        jax.jit(update, donate_argnums=0, out_shardings=whole),
        jax.jit(measure, out_shardings=whole),
        jax.jit(predict, out_shardings=whole),
    )


def wait_on_cpu(results):
    """Waits for results on CPUs, whose virtual devices can deadlock with a queue."""
    cpu = jax.default_backend() == "cpu"
    return jax.block_until_ready(results) if cpu else results


def measure_stats(programs: Programs, params, x, batches):
    """Returns BatchNorm's statistics for these weights: the mean over the batches."""
    stats = [
        wait_on_cpu(programs.measure(params, x, rows, jax.random.key(i)))
        for i, rows in enumerate(batches)
    ]
    return jax.tree.map(lambda *stats: sum(stats) / len(stats), *stats)


def accuracy(programs, params, batch_stats, data, batch) -> float:
    images = len(data.test_y)
    rows = np.resize(np.arange(images), (math.ceil(images / batch), batch))
    classes = [
        wait_on_cpu(programs.predict(params, batch_stats, data.test_x, r)) for r in rows
    ]
    return 100 * np.mean(np.concatenate(classes)[:images] == data.test_y)


def weights(state: State, name: str) -> dict[str, Any]:
    """Returns the weights to evaluate, the optimizer's result first."""
    if name != "lookahead":
        return {"trained": state.params}
    return {"slow": slow_params(state.opt_state, state.params), "fast": state.params}


class Run(NamedTuple):
    history: np.ndarray  # by epoch: training loss, and test accuracy in %
    final: dict[str, float]  # test accuracy in %, by weights and statistics


def open_checkpoints(name: str, data: Data, args) -> ocp.CheckpointManager:
    # The name of the folder has all that a run depends on, so runs are not mixed up.
    settings = (args.epochs, args.batch, args.seed, args.width, args.precision)
    folder = args.checkpoint / "-".join(map(str, (name, *settings, data.md5[:8])))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def train(name: str, data: Data, programs: Programs, state, args, bar) -> Run:
    """Trains with one optimizer, from its last checkpoint if there is one."""
    key, history = jax.random.key(args.seed), np.full((2, args.epochs), np.nan)
    start = 0
    if args.checkpoint:
        manager = open_checkpoints(name, data, args)
        start = manager.latest_step() or 0
        if start:
            template = ocp.args.StandardRestore((state, history))
            state, history = manager.restore(start, args=template)
            bar.update(int(state.step))

    def evaluate(params, batch_stats):
        return accuracy(programs, params, batch_stats, data, args.batch)

    def evaluate_measured(params, batches):
        batches = batches[:MEASURED]
        return evaluate(params, measure_stats(programs, params, data.train_x, batches))

    for epoch in range(start, args.epochs):
        batches = shuffled(len(data.train_x), args.batch, args.seed, epoch)
        losses = []
        for rows in batches:
            state, loss = wait_on_cpu(
                programs.update(state, data.train_x, data.train_y, rows, key)
            )
            if not losses:
                bar.unpause()  # leaves compiling and evaluating out of the estimate
            losses.append(loss)
            bar.update()
        losses = np.array(losses)
        if not np.isfinite(losses).all():
            bar.close()
            first = losses[~np.isfinite(losses)][0]
            sys.exit(f"{name}: a loss in epoch {epoch + 1} is {first}.")
        params = next(iter(weights(state, name).values()))
        history[:, epoch] = np.mean(losses), evaluate_measured(params, batches)
        if args.checkpoint:
            manager.save(epoch + 1, args=ocp.args.StandardSave((state, history)))
        bar.set_postfix_str("loss {:.3f}, test {:.2f} %".format(*history[:, epoch]))
    if args.checkpoint:
        manager.close()
    batches, final = shuffled(len(data.train_x), args.batch, args.seed), {}
    for label, params in weights(state, name).items():
        final[f"{label}, statistics measured"] = evaluate_measured(params, batches)
        final[f"{label}, running statistics"] = evaluate(params, state.batch_stats)
    return Run(history, final)


def draw(runs: dict[str, Run], classes: int, args: argparse.Namespace) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, run in runs.items():
        colour, style = STYLES[name]
        for ax, values in zip(axes, run.history, strict=True):
            epochs = np.arange(1, len(values) + 1)
            ax.plot(epochs, values, style, color=colour, label=name)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("training loss, mean of the epoch")
    axes[1].set_ylabel("test accuracy, %")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()
    figure.suptitle(
        f"CIFAR-{classes}, ResNet-18 of width {args.width}, seed {args.seed}"
    )
    figure.savefig(args.out, dpi=110)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, Data]:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=pathlib.Path, default="cifar-10-python.tar.gz", help="archive")
    add("--optimizer", nargs="+", choices=STYLES, default=["lookahead"])
    add("--epochs", type=int, default=200, help="the rate drops at 30, 60 and 80 %%")
    add("--batch", type=int, default=128, help="images in a batch, on all devices")
    add("--seed", type=int, default=0)
    add("--width", type=int, default=64, help="channels of the first stage")
    add(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32" if jax.default_backend() == "cpu" else "bfloat16",
        help="of the network's arithmetic (default here: %(default)s)",
    )
    add("--checkpoint", type=pathlib.Path, help="folder to save to and resume from")
    add("--out", type=pathlib.Path, default="cifar10.png", help="a PNG")
    args = parser.parse_args(argv)
    parser.check_counts(args, "epochs", "batch", "width")
    if args.batch % jax.device_count():
        parser.error(
            f"--batch must be a multiple of the {jax.device_count()} devices, got "
            f"{args.batch}."
        )
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in 0 to 2**32 - 1, got {args.seed}.")
    if args.checkpoint and args.checkpoint.exists() and not args.checkpoint.is_dir():
        parser.error(f"--checkpoint must be a folder, got {args.checkpoint}.")
    parser.check_picture(args.out)
    try:
        return args, read_archive(args.data)
    except ValueError as error:
        parser.error(str(error))


def print_table(runs: dict[str, Run]) -> None:
    row = "{:<12}{:<29}{:>16}"
    print("\n" + row.format("optimizer", "weights", "test accuracy, %"))
    for name, run in runs.items():
        for label, percent in run.final.items():
            print(row.format(name, label, f"{percent:.2f}"))


def main() -> None:
    args, data = parse_args(sys.argv[1:])
    print(f"CIFAR-{data.classes}: {len(data.train_x)} and {len(data.test_x)} images.")
    if data.md5 != MD5[data.classes]:
        published = MD5[data.classes]
        print(f"Its MD5 is {data.md5}, the published archive's is {published}.")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    model = ResNet18(data.classes, args.width, jnp.dtype(args.precision))
    programs = make_programs(model, mesh, *mean_and_std(data.train_x))
    train_x, train_y, test_x = jax.device_put(data[:3], whole)
    data = data._replace(train_x=train_x, train_y=train_y, test_x=test_x)
    updates = args.epochs * math.ceil(len(train_x) / args.batch)
    runs = {}
    with tqdm(total=len(args.optimizer) * updates, unit="update") as bar:
        for name in args.optimizer:
            bar.set_description(name)
            tx = make_optimizer(name, updates)
            state = create_state(model, tx, jax.random.key(args.seed))
            state = jax.device_put(state, whole)
            runs[name] = train(name, data, programs, state, args, bar)
    print_table(runs)
    draw(runs, data.classes, args)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()
