"""Does a run that was saved and restored go on as if it had never stopped?"""

import functools
import json
import pathlib
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers.rows import slow_but
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_lookahead import lookahead, outer_loop, slow_params

K = 5
# What a sync may do to the inner optimizer's state, and an outer optimizer's state too.
INNER_STATES = ("keep", "reset", "interpolate", "outer_loop")
ALPHA = optax.linear_schedule(0.3, 0.9, 6)
# Adam's moments and count, and a schedule's.
INNER = optax.adamw(optax.cosine_decay_schedule(0.1, 60))
STEPS = 5 * K  # three cycles or more after every save, which come in the second one
# Those with the most in their state, an anchor and an outer state.
telling_states = pytest.mark.parametrize(
    "inner_state", slow_but(["interpolate", "outer_loop"], INNER_STATES)
)
SAVES = range(K, 2 * K)  # after this many steps: at every position in a cycle


def make(inner_state):
    if inner_state == "outer_loop":
        nesterov = optax.sgd(ALPHA, momentum=0.5, nesterov=True)
        return outer_loop(INNER, nesterov, K, slow_dtype="float32")
    return lookahead(INNER, K, ALPHA, inner_state=inner_state)


def initial_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(32, 16)), jnp.float32),
        "scale": jnp.asarray(rng.normal(size=64), jnp.bfloat16),
        "nested": (jnp.asarray(rng.normal(), jnp.float32), {}),
    }


def gradient(params, step):
    """Returns gradients by element, in arithmetic that no sharding rounds otherwise."""
    return jax.tree.map(lambda p: 2 * p - (step % 7 - 3).astype(p.dtype), params)


@functools.cache
def compiled_step(inner_state):
    tx = make(inner_state)

    @jax.jit
    def train_step(params, state, step):
        updates, state = tx.update(gradient(params, step), state, params)
        return optax.apply_updates(params, updates), state

    return train_step


def train(inner_state, params, state, first, last=STEPS):
    """Returns parameters and state after every step from `first` on."""
    visited = []
    for step in range(first, last):
        params, state = compiled_step(inner_state)(params, state, jnp.asarray(step))
        visited.append((params, state))
    return visited


@functools.cache
def uninterrupted(inner_state):
    params = initial_params()
    return train(inner_state, params, make(inner_state).init(params), 0)


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert a.tobytes() == b.tobytes(), where


# Functions that save a tree and restore it into a tree like `template`.


def orbax(folder, tree, template):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", tree)
        return checkpointer.restore(folder / "state", template)


def orbax_asynchronous(folder, tree, template):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "state", template)


def orbax_manager(folder, tree, template, asynchronous=False):
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(folder, options=options) as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(folder, options=options) as manager:
        assert manager.latest_step() == 7
        return manager.restore(7, args=ocp.args.StandardRestore(template))


def orbax_manager_asynchronous(folder, tree, template):
    return orbax_manager(folder, tree, template, asynchronous=True)


def flax_bytes(folder, tree, template):
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(tree))


def pickled(folder, tree, template):
    return pickle.loads(pickle.dumps(tree))


def npz(folder, tree, template):
    np.savez(folder / "state.npz", *jax.tree.leaves(tree))
    leaves, treedef = jax.tree.flatten(template)
    with np.load(folder / "state.npz") as file:
        # NumPy forgets the name of a dtype that is not its own, such as bfloat16.
        return treedef.unflatten(
            [file[f"arr_{i}"].view(leaf.dtype) for i, leaf in enumerate(leaves)]
        )


@telling_states
@pytest.mark.parametrize(
    "restored",
    [
        orbax,
        orbax_asynchronous,
        orbax_manager,
        orbax_manager_asynchronous,
        flax_bytes,
        pickled,
        npz,
    ],
)
def test_a_restored_state_continues_bit_for_bit_from_every_step_of_a_cycle(
    restored, inner_state, tmp_path
):
    expected = uninterrupted(inner_state)
    other = initial_params(seed=1)  # what a restarted script holds until it restores
    template = other, make(inner_state).init(other)
    positions = set()
    for step in SAVES:
        folder = tmp_path / str(step)
        folder.mkdir()
        params, state = restored(folder, expected[step - 1], template)
        assert_same_bits((params, state), expected[step - 1])
        positions.add(int(state.steps_since_sync))
        visited = train(inner_state, params, state, step)
        assert len(visited) >= 3 * K
        for got, want in zip(visited, expected[step:], strict=True):
            assert_same_bits(got, want)
    assert positions == set(range(K))


@telling_states
def test_an_nnx_model_and_optimizer_continue_bit_for_bit_from_every_step_of_a_cycle(
    inner_state, tmp_path
):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - x[:, :1]) ** 2))(model)
        optimizer.update(model, grads)

    def create(seed):
        rngs = nnx.Rngs(seed)
        layers = nnx.Linear(3, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 1, rngs=rngs)
        model = nnx.Sequential(*layers)
        return model, nnx.Optimizer(model, make(inner_state), wrt=nnx.Param)

    def snapshot(both):
        return jax.tree.map(np.asarray, nnx.state(both))

    run, expected = create(0), []
    for step in range(1, STEPS + 1):
        train_step(*run)
        expected.append(snapshot(run))
        if step in SAVES:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / str(step), nnx.state(run))
    for step in SAVES:
        run = create(1)
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(tmp_path / str(step), nnx.state(run))
        nnx.update(run, saved)
        assert_same_bits(snapshot(run), expected[step - 1])
        for want in expected[step:]:
            train_step(*run)
            assert_same_bits(snapshot(run), want)


def on_mesh(params, devices):
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    specs = {
        "w": PartitionSpec("data"),
        "scale": PartitionSpec("data"),
        "nested": (PartitionSpec(), {}),
    }
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    return jax.device_put(params, shardings), mesh


def abstract_state(tx, params, mesh):
    """Returns the state as shapes that carry the shardings it shall be restored to."""
    return optax.tree.map_params(
        tx,
        lambda leaf, p: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=p.sharding
        ),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
    )


def assert_sharded_like(tree, params):
    for leaf, p in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(p.sharding, p.ndim)


@telling_states
def test_a_state_saved_on_eight_devices_continues_bit_for_bit_on_four(
    inner_state, tmp_path
):
    tx = make(inner_state)
    params, _ = on_mesh(initial_params(), 8)
    expected = train(inner_state, params, tx.init(params), 0)
    template, mesh = on_mesh(initial_params(seed=1), 4)
    for step in SAVES:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(step), expected[step - 1])
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                tmp_path / str(step), (template, abstract_state(tx, template, mesh))
            )
        assert_same_bits(restored, expected[step - 1])
        visited = train(inner_state, *restored, step)
        for got, want in zip([restored, *visited], expected[step - 1 :], strict=True):
            assert_same_bits(got, want)
            assert_sharded_like(got[0], template)
            assert_sharded_like(got[1].slow_params, template)
            assert_sharded_like(slow_params(got[1], got[0]), template)


# Checkpoints of something else.


def smaller(params):
    return {name: params[name] for name in ("w", "nested")}


def test_orbax_names_the_parameters_that_only_the_checkpoint_has(tmp_path):
    params = initial_params()
    tree = params, make("keep").init(params)
    template = smaller(params), make("keep").init(smaller(params))
    with pytest.raises(ValueError, match="structures do not match") as error:
        orbax_asynchronous(tmp_path, tree, template)
    assert "[1].slow_params.scale" in str(error.value)
    assert "Source: MISSING" in str(error.value)


def test_orbax_names_the_state_of_another_inner_optimizer(tmp_path):
    params = initial_params()
    tree = params, make("keep").init(params)
    template = params, lookahead(optax.sgd(0.1, momentum=0.9)).init(params)
    with pytest.raises(ValueError, match="structures do not match") as error:
        orbax_asynchronous(tmp_path, tree, template)
    assert "[1].fast_state:" in str(error.value)


def test_orbax_names_the_state_that_is_of_the_inner_optimizer_alone(tmp_path):
    params = initial_params()
    template = params, make("keep").init(params)
    with pytest.raises(ValueError, match="structures do not match") as error:
        orbax_asynchronous(tmp_path, (params, INNER.init(params)), template)
    assert "[1]:" in str(error.value)


def test_flax_names_the_field_that_a_checkpoint_of_another_tree_lacks():
    params = initial_params()
    saved = flax.serialization.to_bytes(make("keep").init(smaller(params)))
    with pytest.raises(ValueError, match="scale"):
        flax.serialization.from_bytes(make("keep").init(params), saved)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            smaller(initial_params()),
            r"got no leaf at \['scale'\], where the state has shape \(64,\)",
        ),
        (
            initial_params() | {"bias": jnp.ones(3)},
            r"got shape \(3,\) at \['bias'\], where the state has no leaf",
        ),
        (
            initial_params() | {"w": jnp.ones((4, 8))},
            r"got shape \(4, 8\) at \['w'\], where the state has shape \(32, 16\)",
        ),
    ],
    ids=["fewer", "more", "other shape"],
)
def test_update_names_the_leaf_where_an_unpickled_state_is_of_other_parameters(
    params, message
):
    # SGD, which does not read the parameters and so raises no error itself.
    tx = lookahead(optax.sgd(0.1))
    state = pickle.loads(pickle.dumps(tx.init(initial_params())))
    with pytest.raises(ValueError, match=message):
        tx.update(params, state, params)


# Runs of release 0.1.0, saved after five steps of cycles of three, with their
# parameters five steps later.
RELEASED = json.loads(
    (pathlib.Path(__file__).parent / "checkpoints" / "0.1.0.json").read_text()
)
RELEASED_RUNS = {
    "keep": lookahead(optax.adam(0.1), 3, 0.5),
    "nesterov": outer_loop(
        optax.sgd(0.1, momentum=0.9), optax.sgd(0.7, momentum=0.9, nesterov=True), 3
    ),
    "interpolate": lookahead(optax.adam(0.1), 3, 0.5, inner_state="interpolate"),
}


def from_release(name):
    """Returns parameters and state as the release had them, and where it ended."""
    saved, tx = RELEASED[name], RELEASED_RUNS[name]

    def arrays(tree):
        if isinstance(tree, dict):
            return {key: arrays(value) for key, value in tree.items()}
        return tree if tree is None else jnp.asarray(tree)

    params, later = arrays(saved["params"]), arrays(saved["later"])
    state = tx.init(params)
    saved = arrays(saved["state"])
    anchor = saved["anchor"]
    if name == "interpolate":
        # As in a pickle of that release: None for fields that are not interpolated.
        moments = {"mu": anchor["0"]["mu"], "nu": anchor["0"]["nu"]}
        anchor = optax.ScaleByAdamState(count=None, **moments), optax.EmptyState()
        saved["anchor"] = flax.serialization.to_state_dict(state.anchor)
        restored = flax.serialization.from_state_dict(state, saved)
        return params, restored._replace(anchor=anchor), later
    return params, flax.serialization.from_state_dict(state, saved), later


def go_on(tx, params, state):
    for step in range(5, 10):
        grads = jax.tree.map(lambda p, step=step: p - jnp.cos(step + p), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_ends_there(got, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, expected
    )


@pytest.mark.parametrize("name", ["keep", "nesterov"])
def test_a_checkpoint_of_the_first_release_continues_as_it_did(name):
    params, state, later = from_release(name)
    assert_ends_there(go_on(RELEASED_RUNS[name], params, state), later)


def test_the_anchor_of_the_first_release_is_refused_with_a_recipe_that_works():
    tx = RELEASED_RUNS["interpolate"]
    params, state, later = from_release("interpolate")
    with pytest.raises(ValueError, match="`anchor` must hold the trees") as refusal:
        go_on(tx, params, state)
    _, recipe = str(refusal.value).split("version 0.1 write `")
    state = eval(
        recipe.rstrip("`."), {"state": state, "jax": jax, "tx": tx, "params": params}
    )
    assert_ends_there(go_on(tx, params, state), later)


def test_the_slow_weights_alone_are_read_from_a_checkpoint_of_everything(tmp_path):
    params = initial_params()
    tx = make("keep")
    state = tx.init(params)
    for _ in range(K + 2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    expected = slow_params(state, params)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    target = {"opt_state": {"slow_params": wanted}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        everything = {"params": params, "opt_state": state}
        checkpointer.save(tmp_path / "run", args=ocp.args.PyTreeSave(everything))
        restored = checkpointer.restore(
            tmp_path / "run",
            args=ocp.args.PyTreeRestore(
                item=target,
                partial_restore=True,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            ),
        )
    assert list(restored["opt_state"]) == ["slow_params"]
    got = restored["opt_state"]["slow_params"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert not np.array_equal(got["w"], params["w"])
