"""Does everything that the README shows run, and is everything it claims so?

Its `pycon` block is a doctest, which pytest runs by itself.
"""

import pathlib
import re

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from training import scanned

from optax_lookahead import lookahead, slow_params

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_block_makes_an_optimizer():
    namespace = {"optax": optax, "lookahead": lookahead}
    exec(BLOCKS[0], namespace)
    assert isinstance(namespace["tx"], optax.GradientTransformationExtraArgs)


def test_the_complete_example_trains_and_its_weights_can_be_saved(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(BLOCKS[1], namespace)
    printed = capsys.readouterr().out
    loss = re.fullmatch(r"training loss at the slow weights: (\d\.\d{3})\n", printed)
    assert float(loss[1]) < 0.3
    exec(BLOCKS[2], namespace)
    accuracy = re.fullmatch(r"accuracy (\d\.\d\d)\n", capsys.readouterr().out)
    assert float(accuracy[1]) > 0.95
    saved = (tmp_path / "weights.msgpack").read_bytes()
    slow = flax.serialization.from_bytes(namespace["params"], saved)
    jax.tree.map(np.testing.assert_array_equal, slow, namespace["slow"])


def recipe_of_nnx(folder, namespace):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "slow", namespace["slow"])


def recipe_of_equinox(folder, namespace):
    saved = eqx.tree_deserialise_leaves(folder / "slow.eqx", namespace["model"])
    return eqx.filter(saved, eqx.is_inexact_array)


@pytest.mark.parametrize(
    ("block", "load"), [(3, recipe_of_nnx), (4, recipe_of_equinox)]
)
def test_recipe(block, load, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(BLOCKS[block], namespace)
    printed = capsys.readouterr().out
    fast, slow = re.fullmatch(r"fast (\d\.\d+), slow (\d\.\d+)\n", printed).groups()
    assert float(fast) < 0.2
    assert float(slow) < 0.2
    assert fast != slow
    loaded = jax.tree.leaves(load(tmp_path, namespace))
    model = namespace["slow_model"]
    if isinstance(model, nnx.Module):
        model = nnx.state(model, nnx.Param)
    expected = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert len(expected) == 4
    for a, b in zip(loaded, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_recipe_for_sharding_shards_all_that_is_like_a_parameter(
    devices, capsys, monkeypatch
):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    namespace = {}
    exec(BLOCKS[5], namespace)
    printed = capsys.readouterr().out
    fast, slow = re.fullmatch(r"fast (\d\.\d+), slow (\d\.\d+)\n", printed).groups()
    assert float(fast) < 0.1
    assert float(slow) < 0.1
    assert fast != slow
    init, key = namespace["init"], namespace["key"]
    after_training = namespace["params"], namespace["state"]
    for params, state in (init(key), after_training):
        adam = state.fast_state[0]
        for tree in (params, state.slow_params, adam.mu, adam.nu):
            for x in jax.tree.leaves(tree):
                assert {s.data.size for s in x.addressable_shards} == {
                    x.size // devices
                }
                assert len(x.addressable_shards) == devices


def steps(namespace, number):
    """Returns where the recipe ends that is never interrupted."""
    params, opt_state = namespace["create"]()
    for _ in range(number):
        params, opt_state = namespace["train_step"](params, opt_state)
    return params, opt_state


def test_recipe_that_resumes_here_and_on_a_mesh_and_turns_lookahead_off_and_on(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for printed in ("steps 1 to 7\n", "steps 8 to 14\n"):
        namespace = {}
        exec(BLOCKS[6], namespace)
        assert capsys.readouterr().out == printed
    got, expected = (namespace["params"], namespace["opt_state"]), steps(namespace, 14)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)

    exec(BLOCKS[7], namespace)
    params, opt_state = namespace["params"], namespace["opt_state"]
    assert len(namespace["mesh"].devices) == 8
    for leaf in (params["w"], opt_state.slow_params["w"]):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec("data")
    # The mesh adds up the gradient in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        (params, opt_state),
        steps(namespace, 15),
    )

    namespace["opt_state"] = opt_state._replace(steps_since_sync=jnp.asarray(2))
    exec(BLOCKS[8], namespace)
    np.testing.assert_array_equal(namespace["params"]["w"], opt_state.slow_params["w"])
    turned_on = namespace["opt_state"]
    assert (turned_on.steps_since_sync, turned_on.sync_count) == (0, 0)
    jax.tree.map(
        np.testing.assert_array_equal, turned_on.fast_state, opt_state.fast_state
    )
    train_step = jax.jit(namespace["train_step"].__wrapped__)
    train_step(namespace["params"], turned_on)


DESCENDANTS = (
    "snoo", "diloco_1", "muloco_1", "slowmo", "multilayer", "minmax", "airbench"
)  # fmt: skip


@pytest.mark.parametrize("name", DESCENDANTS)
def test_the_line_for_a_descendant_trains(name):
    namespace = {}
    exec(BLOCKS[9], namespace)
    made = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, optax.GradientTransformationExtraArgs)
    }
    assert set(made) - {"sgd", "adamw"} == set(DESCENDANTS)
    start, tx = {"w": jnp.eye(2, 3), "b": jnp.ones(())}, made[name]
    params, state = scanned(tx, start, lambda params, step: params, 100)
    assert state.sync_count[-1] >= 2
    slow = slow_params(*(jax.tree.map(lambda x: x[-1], x) for x in (state, params)))
    assert 0.0 < optax.tree.norm(slow) < optax.tree.norm(start)


def test_no_other_python_block_stands_untested():
    assert len(BLOCKS) == 11


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_the_two_lines_that_install_and_run_are_there(extra):
    what = {"examples": "examples/digits.py", "test": "-m pytest"}[extra]
    line = f'python -m pip install -e ".[{extra}]" && python {what}'
    assert README.count(f"\n{line}\n") == 1


# The table of differences: what works here is an error in `optax.lookahead`.

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}


def train(tx, params, steps=4, **extra_args):
    state = tx.init(params)
    for _ in range(steps):
        grads = params.fast if isinstance(params, optax.LookaheadParams) else params
        updates, state = tx.update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def in_train_state(make, params):
    tx = make(optax.sgd(0.1), 2, 0.5)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state.apply_gradients(grads=PARAMS)


def in_nnx_optimizer(make, params):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(optax.sgd(0.1), 2, 0.5), wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    optimizer.update(model, grads)


def in_masked(make, params):
    train(optax.masked(make(optax.sgd(0.1), 2, 0.5), {"w": True, "b": False}), params)


def in_partition(make, params):
    transforms = {"a": make(optax.sgd(0.1), 2, 0.5), "b": optax.sgd(0.1)}
    train(optax.partition(transforms, {"w": "a", "b": "b"}), params)


def in_multi_steps(make, params):
    train(optax.MultiSteps(make(optax.sgd(0.1), 2, 0.5), 2), params)


def in_apply_if_finite(make, params):
    train(optax.apply_if_finite(make(optax.sgd(0.1), 2, 0.5), 3), params)


def with_extra_arguments(make, params):
    train(make(optax.polyak_sgd(), 2, 0.5), params, value=jnp.asarray(1.0))


def with_a_traced_k(make, params):
    jax.jit(lambda k: train(make(optax.sgd(0.1), k, 0.5), params))(2)


def with_injected_hyperparameters(make, params):
    tx = optax.inject_hyperparams(make)(optax.sgd(0.1), 2, 0.5)
    jax.jit(lambda params: train(tx, params))(params)


def with_a_schedule(make, params):
    train(make(optax.sgd(0.1), 2, optax.constant_schedule(0.5)), params)


def with_donation(make, params):
    tx = make(optax.sgd(0.1), 2, 0.5)
    params = jax.tree.map(jnp.copy, PARAMS)
    if make is optax.lookahead:
        params = optax.LookaheadParams.init_synced(params)

    def step(params, state):
        updates, state = tx.update(PARAMS, state, params)
        return optax.apply_updates(params, updates), state

    jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (in_train_state, AttributeError),
        (in_nnx_optimizer, AttributeError),
        (in_masked, ValueError),
        (in_partition, ValueError),
        (in_multi_steps, ValueError),
        (in_apply_if_finite, TypeError),
        (with_extra_arguments, TypeError),
        (with_a_traced_k, jax.errors.TracerBoolConversionError),
        (with_injected_hyperparameters, jax.errors.TracerBoolConversionError),
        (with_a_schedule, TypeError),
        (with_donation, jax.errors.JaxRuntimeError),
    ],
)
def test_works_here_and_is_an_error_upstream(use, error):
    use(lookahead, PARAMS)
    with pytest.raises(error):
        use(optax.lookahead, optax.LookaheadParams.init_synced(PARAMS))


def test_an_infinite_gradient_inside_a_cycle_spoils_only_upstream_slow_weights():
    infinite = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS)
    tx = lookahead(optax.sgd(0.1), 5, 0.5)
    _, state = tx.update(infinite, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.slow_params, PARAMS)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    updates, _ = tx.update(infinite, tx.init(pair), pair)
    pair = optax.apply_updates(pair, updates)
    assert np.all(np.isnan(pair.slow["w"]))


def test_only_upstream_fast_and_slow_weights_differ_after_a_sync():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=1000), jnp.float32)}
    fast, state = train(lookahead(optax.adam(0.1), 2, 0.3), params, steps=2)
    np.testing.assert_array_equal(state.slow_params["w"], fast["w"])
    pair = optax.LookaheadParams.init_synced(params)
    pair, _ = train(optax.lookahead(optax.adam(0.1), 2, 0.3), pair, steps=2)
    assert np.any(np.asarray(pair.fast["w"]) != np.asarray(pair.slow["w"]))


def headings(page):
    titles = re.findall(r"^#+ (.+)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize(
    ("page", "picture"),
    [
        ("README.md", "examples/digits.png"),
        ("examples/README.md", "noisy_quadratic.png"),
        ("benchmarks/README.md", "scaling.png"),
    ],
)
def test_the_pictures_files_and_headings_that_a_page_points_to_exist(page, picture):
    page = pathlib.Path(__file__).parents[2] / page
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    assert picture in links
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_the_adaptive_alpha_trains_and_is_shown(capsys):
    (block,) = (block for block in BLOCKS if "line_minimum(" in block)
    exec(block, {})
    printed = capsys.readouterr().out
    loss, alpha = re.fullmatch(
        r"loss (\d+\.\d{4}), alpha (\d\.\d\d)\n", printed
    ).groups()
    assert float(loss) < 0.1
    assert 0.2 <= float(alpha) <= 1.0
