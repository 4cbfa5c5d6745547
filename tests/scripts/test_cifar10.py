"""Does the CIFAR example read the archives, train as it says, and refuse bad input?

The archives are written here in the format of the published ones. Where only compiling
the ResNet would take time, a small network takes its place.
"""

import functools
import io
import pickle
import re
import tarfile
import types

import cifar10
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import EXAMPLES, check_refused, run
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from optax_lookahead import slow_params


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which wrote the published archives."""

    def save_string(self, value):
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + len(data).to_bytes(4, "little") + data)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def python_2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multi", b"cnumpy.core.multi")


def batch(n, seed, classes=10, label_name="labels"):
    rng = np.random.default_rng(seed)
    return {
        "batch_label": "of a test",
        label_name: rng.integers(classes, size=n).tolist(),
        "data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
        "filenames": n * ["none.png"],
    }


def cifar_10(n=8, test=5):
    parts = {f"data_batch_{i}": batch(n, i) for i in range(1, 6)}
    parts["test_batch"] = batch(test, 6)
    meta = {"label_names": ["airplane"]}
    return {f"cifar-10-batches-py/{name}": parts[name] for name in parts} | {
        "cifar-10-batches-py/batches.meta": meta
    }


def write_archive(path, members, dumps=python_2_pickle):
    with tarfile.open(path, "w:gz") as archive:
        for name, value in members.items():
            content = value if isinstance(value, bytes) else dumps(value)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


class Tiny(nn.Module):
    """A small model for the example; its BatchNorm sees the images' mean first."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, momentum=self.momentum)(x)
        x = nn.relu(nn.Conv(4, (3, 3), 4)(x))
        x = nn.BatchNorm(not train, momentum=self.momentum)(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.fixture(autouse=True, scope="module")
def fast_compiles():
    """Compiles without optimizing, since compiling is what these tests wait for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def without_augmentation(monkeypatch):
    monkeypatch.setattr(cifar10, "augment", lambda images, key: images)
    return tiny_programs.__wrapped__()


ONES = np.ones((1, 1, 1, 3), np.float32)


@functools.cache
def tiny_programs(devices=1):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return cifar10.make_programs(Tiny(), mesh, 120 * ONES, 70 * ONES)


@functools.cache
def tiny_optimizer():
    return cifar10.make_optimizer("lookahead", 4 * 3)


def tiny_state():
    return cifar10.create_state(Tiny(), tiny_optimizer(), jax.random.key(0))


def tiny_data(path, **sizes):
    return cifar10.read_archive(write_archive(path / "tiny.tar.gz", cifar_10(**sizes)))


def tiny_run(data, programs, checkpoint=None):
    args = types.SimpleNamespace(
        epochs=4, batch=16, seed=0, width=0, precision="float32", checkpoint=checkpoint
    )
    with tqdm(disable=True) as bar:
        return cifar10.train("lookahead", data, programs, tiny_state(), args, bar)


@pytest.mark.slow
def test_a_run_prints_the_accuracies_and_draws_a_picture(tmp_path):
    archive = write_archive(tmp_path / "tiny.tar.gz", cifar_10())
    picture = tmp_path / "cifar10.png"
    sizes = ("--width", 2, "--epochs", 2, "--batch", 16)
    result = run(
        *(EXAMPLES / "cifar10.py", "--data", archive, "--out", picture, *sizes),
    )
    assert result.returncode == 0, result.stderr
    assert "CIFAR-10: 40 and 5 images." in result.stdout
    assert re.search(rf"MD5 is \w{{32}}, .* is {cifar10.MD5[10]}\.", result.stdout)
    rows = re.findall(r"^lookahead +(\w+), (\w+) .* (\d+)\.\d\d$", result.stdout, re.M)
    assert [row[:2] for row in rows] == [
        ("slow", "statistics"),
        ("slow", "running"),
        ("fast", "statistics"),
        ("fast", "running"),
    ]
    assert {int(row[2]) for row in rows} <= {0, 20, 40, 60, 80, 100}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "6/6" in result.stderr, "the progress bar counts every update"


@pytest.mark.parametrize("dumps", [python_2_pickle, pickle.dumps])
def test_cifar_10_is_read(dumps, tmp_path):
    members = {
        name: {key.encode(): value for key, value in part.items()}
        for name, part in cifar_10().items()
    }
    path = write_archive(tmp_path / "a.tar.gz", members, dumps)
    data = cifar10.read_archive(path)
    parts = list(members.values())
    assert data.classes == 10
    for x, y, expected in (
        (data.train_x, data.train_y, parts[:5]),
        (data.test_x, data.test_y, parts[5:6]),
    ):
        np.testing.assert_array_equal(x, np.concatenate([p[b"data"] for p in expected]))
        labels = np.concatenate([p[b"labels"] for p in expected])
        np.testing.assert_array_equal(y, labels)


def test_cifar_100_is_read_with_its_fine_labels(tmp_path):
    parts = {
        name: batch(30, seed, 100, "fine_labels") | {"coarse_labels": 30 * [0]}
        for seed, name in enumerate(("train", "test"))
    }
    path = write_archive(
        tmp_path / "a", {f"cifar-100-python/{name}": parts[name] for name in parts}
    )
    data = cifar10.read_archive(path)
    assert data.classes == 100
    np.testing.assert_array_equal(data.train_x, parts["train"]["data"])
    np.testing.assert_array_equal(data.train_y, parts["train"]["fine_labels"])
    np.testing.assert_array_equal(data.test_y, parts["test"]["fine_labels"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "100"], "--batch must be a multiple of the 8 devices, got 100."),
        (["--epochs", "0"], "--epochs must be at least 1, got 0."),
        (["--width", "-1"], "--width must be at least 1, got -1."),
        (["--seed", "-1"], "--seed must be in 0 to 2**32 - 1, got -1."),
        (["--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--checkpoint", __file__], "--checkpoint must be a folder, got "),
        (["--out", "missing/c.png"], "--out must be a .png in an existing folder"),
        (["--data", "missing/c.tar.gz"], "https://www.cs.toronto.edu/~kriz/cifar.html"),
        (["--data", __file__], "is not a whole tar archive ("),
        (["--data", "."], "is not a whole tar archive ("),
    ],
)
def test_a_bad_option_is_answered_with_one_line(arguments, message):
    check_refused(cifar10.main, arguments, message)


class RunsCode:
    def __reduce__(self):
        return print, ("this pickle ran code",)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data_batch_3", None, "has no data_batch_3: it must be the python version"),
        ("test_batch", None, "has no test_batch: it must be the python version"),
        ("test_batch", RunsCode(), "test_batch is not a batch of images (Unpickl"),
        ("test_batch", b"\x80", "test_batch is not a batch of images ("),
        ("test_batch", [1], "test_batch is not a batch of images ("),
        ("test_batch", {"labels": None}, "test_batch must hold a label of 0 to 9 per"),
        ("test_batch", {"labels": [10, 0]}, "test_batch must hold a label of 0 to 9 p"),
        ("test_batch", {"labels": [-1, 0]}, "test_batch must hold a label of 0 to 9 p"),
        ("test_batch", {"labels": [0]}, "test_batch must hold a label of 0 to 9 per"),
        ("test_batch", {"data": np.ones((2, 3072))}, "must hold uint8 images of 3072"),
        ("test_batch", {"data": np.ones((2, 9), np.uint8)}, "must hold uint8 images"),
        ("test_batch", {"data": 1}, "must hold uint8 images of 3072 values each."),
    ],
)
def test_a_bad_member_is_answered_with_one_line(name, change, message, tmp_path):
    members = cifar_10(n=2, test=2)
    path = f"cifar-10-batches-py/{name}"
    if change is None:
        del members[path]
    elif isinstance(change, dict):
        members[path] |= change
    else:
        members[path] = change
    archive = write_archive(tmp_path / "bad.tar.gz", members)
    check_refused(cifar10.main, ["--data", archive], message)


def test_a_download_that_broke_off_is_answered_with_one_line(tmp_path):
    archive = write_archive(tmp_path / "whole.tar.gz", cifar_10())
    archive.write_bytes(archive.read_bytes()[:-1000])
    check_refused(cifar10.main, ["--data", archive], "is not a whole tar archive (")


def test_the_network_is_the_one_of_the_paper():
    model = cifar10.ResNet18(10)
    tx = cifar10.make_optimizer("sgd", 10)
    state = jax.eval_shape(lambda: cifar10.create_state(model, tx, jax.random.key(0)))
    # A weight and a bias for each of 4,800 channels, and the last layer's.
    assert sum(p.size for p in jax.tree.leaves(state.params)) == 11_173_962
    assert sum(s.size for s in jax.tree.leaves(state.batch_stats)) == 9_600


def test_strided_convolutions_pad_both_sides_as_in_pytorch():
    model = cifar10.ResNet18(10, width=1)
    x = jnp.ones((1, 32, 32, 3))

    def corner(x, variables):
        _, seen = model.apply(variables, x, False, capture_intermediates=True)
        return seen["intermediates"]["Block_2"]["__call__"][0][0, 0, 0].sum()

    @jax.jit
    def rows_seen(x):
        variables = model.init(jax.random.key(0), x, False)
        # Positive weights, so that everything that the corner sees has an effect.
        variables = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.1, variables)
        return jnp.abs(jax.grad(corner)(x, variables)).sum(axis=(0, 2, 3)) > 0

    # 0 to 3 of the block's input, five rows more through the convolutions before it.
    np.testing.assert_array_equal(rows_seen(x), np.arange(32) <= 3 + 5)


def torch_sgd(p, lr, steps, memory):
    for grad, drop in steps:
        memory["v"] = 0.9 * memory["v"] + grad + 1e-3 * p
        p = p - lr * drop * memory["v"]
    return p


def torch_adamw(p, lr, steps, memory):
    for grad, drop in steps:
        memory["t"] += 1
        p = p * (1 - lr * drop * 1.0)
        memory["m"] = 0.9 * memory["m"] + 0.1 * grad
        memory["v"] = 0.999 * memory["v"] + 0.001 * grad**2
        m_hat = memory["m"] / (1 - 0.9 ** memory["t"])
        v_hat = memory["v"] / (1 - 0.999 ** memory["t"])
        p = p - lr * drop * m_hat / (np.sqrt(v_hat) + 1e-8)
    return p


@pytest.mark.parametrize("name", ["sgd", "adam", "lookahead"])
def test_the_optimizers_are_those_of_the_paper(name, x64):
    updates = 20
    rng = np.random.default_rng(0)
    drops = np.array(6 * [1] + 6 * [0.2] + 4 * [0.04] + 4 * [0.008])
    steps = list(zip(rng.normal(size=(updates, 3)), drops, strict=True))
    start = rng.normal(size=3)
    memory = {"t": 0, "m": 0, "v": 0}
    if name == "sgd":
        expected = torch_sgd(start, 0.05, steps, memory)
    elif name == "adam":
        expected = torch_adamw(start, 3e-4, steps, memory)
    else:
        expected = start
        for i in range(0, updates, 5):
            fast = torch_sgd(expected, 0.1, steps[i : i + 5], memory)
            expected = expected + 0.8 * (fast - expected)

    tx = cifar10.make_optimizer(name, updates)
    params = {"scale": jnp.asarray(start)}  # BatchNorm's decay too
    state = tx.init(params)
    update = jax.jit(tx.update)
    for grad, _ in steps:
        updates, state = update({"scale": jnp.asarray(grad)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["scale"], expected, rtol=1e-6)


def test_images_are_padded_with_black_cropped_and_flipped():
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, size=(32, 32, 3), dtype=np.uint8)
    images = jnp.broadcast_to(image, (3000, 32, 32, 3))
    results = np.asarray(jax.jit(cifar10.augment)(images, jax.random.key(0)))
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = image
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            crops[crop.tobytes()] = y, x, False
            crops[crop[:, ::-1].tobytes()] = y, x, True
    counts = dict.fromkeys(crops.values(), 0)
    for result in results:
        counts[crops[result.tobytes()]] += 1
    # 18.5 are expected of each of 162.
    assert min(counts.values()) > 2
    assert max(counts.values()) < 45


def test_an_epoch_has_every_image_in_full_batches():
    batches = cifar10.shuffled(50_000, 128, 0, 7)
    assert batches.shape == (391, 128)
    order, again = np.split(batches.ravel(), [50_000])
    np.testing.assert_array_equal(np.sort(order), np.arange(50_000))
    np.testing.assert_array_equal(again, order[: len(again)])
    assert (cifar10.shuffled(50_000, 128, 0, 8) != batches).any()
    assert (cifar10.shuffled(50_000, 128, 1, 7) != batches).any()


def images_of(x):
    return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(np.float32)


def test_the_images_are_normalised_by_channel():
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(50, 3072), dtype=np.uint8)
    x[:, :1024] //= 2
    mean, std = cifar10.mean_and_std(x)
    z = (images_of(x) - mean) / std
    np.testing.assert_allclose(z.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=(0, 1, 2)), 1, rtol=1e-5)


def test_measured_statistics_are_the_mean_of_those_of_the_batches(
    tmp_path, without_augmentation
):
    data, programs, state = tiny_data(tmp_path), without_augmentation, tiny_state()
    batches = np.array([[0, 1, 2, 3], [20, 21, 22, 23]])
    stats = cifar10.measure_stats(programs, state.params, data.train_x, batches)
    x = (images_of(data.train_x[batches.ravel()]) - 120) / 70
    x = x.reshape(2, 4 * 32 * 32, 3)
    first = stats["BatchNorm_0"]
    np.testing.assert_allclose(first["mean"], x.mean(1).mean(0), atol=1e-5)
    np.testing.assert_allclose(first["var"], x.var(1).mean(0), rtol=1e-4)


def test_statistics_of_the_whole_set_make_evaluation_and_training_agree(
    tmp_path, without_augmentation
):
    data, programs, state = tiny_data(tmp_path), without_augmentation, tiny_state()
    whole = np.arange(40)
    stats = cifar10.measure_stats(programs, state.params, data.train_x, [whole])
    x = (images_of(data.train_x) - 120) / 70
    logits = Tiny().apply({"params": state.params, "batch_stats": stats}, x, False)
    own, _ = Tiny().apply({"params": state.params}, x, True, mutable="batch_stats")
    np.testing.assert_allclose(logits, own, atol=1e-4)
    classes = programs.predict(state.params, stats, data.train_x, whole)
    np.testing.assert_array_equal(classes, own.argmax(-1))
    assert np.ptp(classes) > 0


def test_accuracy_counts_every_test_image_once(tmp_path):
    data, programs, state = tiny_data(tmp_path), tiny_programs(), tiny_state()
    stats = state.batch_stats
    data = data._replace(test_x=data.train_x[:13], test_y=data.train_y[:13])
    x = (images_of(data.test_x) - 120) / 70
    logits = Tiny().apply({"params": state.params, "batch_stats": stats}, x, False)
    data.test_y[12] = logits[12].argmax()  # the one in the incomplete batch
    right = np.sum(logits.argmax(-1) == data.test_y)
    accuracy = cifar10.accuracy(programs, state.params, stats, data, 4)
    assert accuracy == pytest.approx(100 * right / 13)


def test_an_update_keeps_running_statistics_and_the_slow_weights(tmp_path):
    data, programs, state = tiny_data(tmp_path), tiny_programs(), tiny_state()
    first = jax.tree.map(np.array, state)  # what the update is given is donated
    key, rows = jax.random.key(1), np.arange(16)
    state, _ = programs.update(state, data.train_x, data.train_y, rows, key)
    weights = cifar10.weights(state, "lookahead")
    assert list(weights) == ["slow", "fast"]
    jax.tree.map(np.testing.assert_array_equal, weights["slow"], first.params)
    assert (weights["fast"]["Dense_0"]["bias"] != first.params["Dense_0"]["bias"]).any()
    # Every update has its own crops and flips.
    key = jax.random.fold_in(key, 0)
    of_batch = programs.measure(first.params, data.train_x, rows, key)
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, first.batch_stats, of_batch
    )
    jax.tree.map(
        lambda stat, value: np.testing.assert_allclose(stat, value, atol=1e-5),
        *(state.batch_stats, expected),
    )


def test_eight_devices_share_the_work_and_train_as_one(tmp_path):
    data, results = tiny_data(tmp_path), []
    batches = cifar10.shuffled(40, 16, 0)
    for devices in (1, 8):
        programs = tiny_programs(devices)
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        state = jax.device_put(tiny_state(), NamedSharding(mesh, PartitionSpec()))
        rest = data.train_x, data.train_y
        key = jax.random.key(1)
        update = programs.update.lower(state, *rest, batches[0], key).compile()
        assert ("all-reduce" in update.as_text()) == (devices > 1)
        for rows in np.concatenate([batches, batches]):
            state, loss = update(state, *rest, rows, key)
            jax.block_until_ready(loss)
        slow = slow_params(state.opt_state, state.params)
        stats = cifar10.measure_stats(programs, slow, data.train_x, batches)
        results.append(jax.tree.map(np.asarray, (state.params, slow, stats, loss)))
    jax.tree.map(
        lambda one, eight: np.testing.assert_allclose(one, eight, atol=1e-4), *results
    )


def test_a_run_that_was_stopped_continues_as_if_it_had_not(tmp_path):
    data, programs = tiny_data(tmp_path), tiny_programs()
    expected = tiny_run(data, programs)
    left = 7  # updates, of three in an epoch: it stops in the third

    def update(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return programs.update(*args)

    stopping = programs._replace(update=update)
    folder = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        tiny_run(data, stopping, folder)
    left = 6
    again = tiny_run(data, stopping, folder)
    assert left == 0, "two epochs were left"
    np.testing.assert_array_equal(again.history, expected.history)
    assert again.final == expected.final
    assert tiny_run(data, stopping, folder).final == expected.final


def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(tmp_path):
    programs = tiny_programs()
    data = tiny_data(tmp_path)

    def update(state, *args):
        return programs.update(state, *args)[0], jnp.nan

    with pytest.raises(SystemExit) as stop:
        tiny_run(data, programs._replace(update=update))
    assert stop.value.code == "lookahead: a loss in epoch 1 is nan."
