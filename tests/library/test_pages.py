"""Does everything that the pages show run, and do their links lead somewhere?

`helpers/pages.py` says how a block is labelled. A `pycon` block is a doctest, which
pytest runs by itself.
"""

import ast
import importlib.metadata
import re
import sys
import tomllib

import chex
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers.pages import (
    LABEL,
    LABELLED,
    PAGES,
    ROOT,
    TESTED,
    all_blocks,
    labelled_blocks,
    python_blocks,
    run_block,
)
from helpers.training import scanned, two_loops, two_loops_with_outer

from optax_lookahead import lookahead, slow_params


def test_the_first_block_makes_an_optimizer():
    namespace = {"optax": optax, "lookahead": lookahead}
    run_block("instead-of-adam", namespace)
    assert isinstance(namespace["tx"], optax.GradientTransformationExtraArgs)


def test_the_complete_example_trains_and_its_weights_can_be_saved(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    namespace = run_block("linen")
    printed = capsys.readouterr().out
    loss = re.fullmatch(r"training loss at the slow weights: (\d\.\d{3})\n", printed)
    assert float(loss[1]) < 0.3
    run_block("linen-save", namespace)
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
    ("label", "load"), [("nnx", recipe_of_nnx), ("equinox", recipe_of_equinox)]
)
def test_a_recipe_trains_fast_and_slow_weights_to_a_low_loss(
    label, load, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    namespace = run_block(label)
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
    namespace = run_block("sharding")
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
        namespace = run_block("resume")
        assert capsys.readouterr().out == printed
    got, expected = (namespace["params"], namespace["opt_state"]), steps(namespace, 14)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)

    run_block("resume-on-a-mesh", namespace)
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
    run_block("turn-on-or-off", namespace)
    np.testing.assert_array_equal(namespace["params"]["w"], opt_state.slow_params["w"])
    turned_on = namespace["opt_state"]
    assert (turned_on.steps_since_sync, turned_on.sync_count) == (0, 0)
    jax.tree.map(
        np.testing.assert_array_equal, turned_on.fast_state, opt_state.fast_state
    )
    train_step = jax.jit(namespace["train_step"].__wrapped__)
    train_step(namespace["params"], turned_on)


def test_the_recipe_that_saves_a_model_and_its_optimizer_resumes_them(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for printed in ("steps 1 to 7\n", "steps 8 to 14\n"):
        namespace = run_block("resume-nnx")
        assert capsys.readouterr().out == printed
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    uninterrupted = run_block("resume-nnx")
    for _ in range(7):
        uninterrupted["train_step"](uninterrupted["model"], uninterrupted["optimizer"])
    got, expected = (
        nnx.state((each["model"], each["optimizer"]))
        for each in (namespace, uninterrupted)
    )
    assert len(jax.tree.leaves(got)) > 8
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_recipe_for_batch_norm_has_the_statistics_of_the_slow_weights(capsys):
    namespace = run_block("nnx-batch-norm")
    printed = capsys.readouterr().out
    assert float(re.fullmatch(r"loss (\d\.\d{4})\n", printed)[1]) < 0.1
    model = namespace["slow_model"]
    hidden = model.layers[0](namespace["x"]).reshape(-1, 16)
    got, of_fast = (each.layers[1].mean[...] for each in (model, namespace["model"]))
    expected = jnp.mean(hidden, 0)
    assert np.max(np.abs(got - expected)) < 0.05
    assert np.max(np.abs(of_fast - expected)) > 0.2


def test_a_train_state_and_the_slow_weights_are_saved_and_restored():
    namespace = run_block("resume-linen")
    state, step = namespace["state"], namespace["train_step"]
    straight = namespace["create"]()
    for _ in range(7):
        straight = step(straight)
    slow = slow_params(straight.opt_state, straight.params)
    jax.tree.map(np.testing.assert_array_equal, namespace["params"], slow)
    assert state.step == 7
    assert straight.opt_state[1].steps_since_sync == 2
    for _ in range(6):
        straight, state = step(straight), step(state)
    for kind in ("params", "opt_state"):
        got, expected = getattr(state, kind), getattr(straight, kind)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_new_moments_with_the_count_of_the_schedule():
    namespace = run_block("surgery-schedule")
    adam, schedule = namespace["state"].fast_state
    assert (adam.count, schedule.count) == (0, 93)
    assert not np.any(adam.mu["w"])
    params, state = namespace["params"], namespace["state"]
    updates, _ = namespace["tx"].update({"w": jnp.ones(3)}, state, params)
    rate = optax.cosine_decay_schedule(0.1, 100)(93)
    np.testing.assert_allclose(updates["w"], -rate, rtol=1e-5)


def test_parameters_that_take_turns_inside_lookahead_are_moved_back_at_syncs():
    def turn(which):
        return optax.conditionally_mask(optax.sgd(1.0), lambda step: step % 2 == which)

    # Sums of gradients of -1: in a cycle of four steps each moves two, of which half
    # is kept.
    tx = lookahead(optax.partition({0: turn(0), 1: turn(1)}, {"d": 0, "g": 1}), 4, 0.5)
    start = {"d": jnp.zeros(()), "g": jnp.zeros((2, 3))}
    params, _ = scanned(
        tx, start, lambda p, step: jax.tree.map(lambda x: x - x - 1, p), 8
    )
    np.testing.assert_array_equal(params["d"], [1, 1, 2, 1, 2, 2, 3, 2])
    np.testing.assert_array_equal(params["g"][:, 1, 2], [0, 1, 1, 1, 1, 2, 2, 2])


def test_two_players_sync_together_after_both_have_moved():
    namespace = run_block("two-players")
    optimizers = namespace["optimizers"]
    # Again as a plain loop, in which both are moved back after every fifth turn.
    slow = params = {
        "d": {
            "w": jax.random.normal(namespace["keys"][0], (2, 8)),
            "v": jax.random.normal(namespace["keys"][1], (8, 1)),
        },
        "g": {"w": jax.random.normal(namespace["keys"][2], (4, 2)), "scale": 1.0},
    }
    states = {name: tx.init(params[name]) for name, tx in optimizers.items()}

    def loss(own, name, params, real, noise):
        return namespace["loss_fns"]({**params, name: own}, real, noise)[name]

    for step in range(1, 24):
        key = jax.random.key(step - 1)
        real = jax.random.normal(key, (16, 2)) + 2
        noise = jax.random.normal(jax.random.fold_in(key, 1), (16, 4))
        for name in ("d", "g"):
            grads = jax.grad(loss)(params[name], name, params, real, noise)
            updates, states[name] = optimizers[name].update(grads, states[name])
            moved = optax.apply_updates(params[name], updates)
            params = params | {name: moved}
        if step % 5 == 0:
            slow = params = jax.tree.map(lambda s, p: (s + p) / 2, slow, params)
    chex.assert_trees_all_close(namespace["params"], params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(namespace["slow"], slow, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_alike_before_lookahead_and_inside():
    namespace = run_block("clipping")
    start = {"w": 3.0 * jnp.eye(2, 3), "b": jnp.ones(()), "v": jnp.ones((1, 2, 2))}
    before, inside, plain = (
        scanned(tx, start, lambda params, step: params, 40)[0]
        for tx in (
            namespace["before"],
            namespace["inside"],
            lookahead(optax.adam(1e-3)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, before, inside)
    assert np.any(before["w"] != plain["w"])
    loop = namespace["pseudo_gradient"]
    far = {"w": jnp.full((2, 3), 1e4)}  # the pseudo-gradient is 1e5 or so
    state = loop.init(far)._replace(steps_since_sync=jnp.asarray(29))
    moved = jax.tree.map(jnp.zeros_like, far)
    _, state = loop.update(moved, state, moved)
    step = optax.tree.norm(optax.tree.sub(state.slow_params, far))
    np.testing.assert_allclose(step, 0.7 * 1.9, rtol=1e-2)


def test_hyperparameters_that_keep_their_types_are_not_compiled_again():
    # As the block does it.
    tx = optax.inject_hyperparams(lookahead)(optax.adam(0.1), k=5, alpha=0.5)
    params = jnp.ones(3)
    state, update = tx.init(params), jax.jit(chex.assert_max_traces(tx.update, n=1))
    for step in range(20):
        if step == 10:
            for name, value in {"k": 2, "alpha": 0.8}.items():
                old = state.hyperparams[name]
                state.hyperparams[name] = jnp.full_like(old, value)
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert state.inner_state.sync_count == 2 + 5
    block = labelled_blocks()["inject"]
    assert "jnp.full_like(old, value)" in block.source
    run_block("inject")


def test_schedules_of_the_inner_optimizer_count_steps_and_others_syncs():
    namespace = run_block("schedules")
    start = {"w": jnp.eye(2, 3), "b": jnp.ones(())}
    for name in ("tx", "rising", "outer_tx"):
        _, state = scanned(namespace[name], start, lambda params, step: params, 65)
        state = state[1] if name == "tx" else state  # of the chain
        assert state.fast_state[-1].count[-1] == 65
        assert state.sync_count[-1] == 2
    assert state.outer_state[1].count[-1] == 2


def test_each_run_of_the_sweep_is_the_run_with_its_k_and_alpha():
    page, got = run_block("sweep"), []
    for k, alpha in zip(page["k"].ravel(), page["alpha"].ravel(), strict=True):
        loops = two_loops(
            optax.adam(0.1), jnp.ones(3), lambda p, _: p, int(k), float(alpha), 20
        )
        got.append([np.asarray(slow) for _, slow in loops][-1])
    np.testing.assert_allclose(page["slow"], got, rtol=1e-5)


def test_the_recipe_for_bfloat16_has_a_float32_state_and_the_slow_weights_of_float32():
    page = run_block("bfloat16")
    state = page["opt_state"]
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert page["params"].dtype == jnp.bfloat16
    assert page["updates"].dtype == page["slow"].dtype == jnp.float32
    loops = two_loops(optax.adamw(0.01), jnp.ones(3), lambda p, _: p, 5, 0.5, 10)
    *_, (_, slow) = loops
    # The fast weights are rounded to bfloat16 in every step.
    np.testing.assert_allclose(page["slow"], slow, atol=10 * 2**-9)
    assert np.any(
        np.float32(page["slow"]) != np.float32(page["slow"].astype("bfloat16"))
    )


DESCENDANTS = (
    "snoo", "diloco_1", "muloco_1", "slowmo", "multilayer", "minmax", "airbench"
)  # fmt: skip


@pytest.mark.parametrize("name", DESCENDANTS)
def test_the_line_for_a_descendant_trains(name):
    namespace = run_block("descendants")
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


def test_the_averages_in_every_step_train():
    namespace = run_block("averages")
    slow, params = namespace["weights"], namespace["params"]
    assert 0.0 < optax.tree.norm(params) < optax.tree.norm(slow) < np.sqrt(3)
    beta = jax.vmap(namespace["beta"])(jnp.arange(3150))
    assert np.array_equal(np.flatnonzero(beta), np.arange(500, 2400))
    assert 0.5 < np.max(beta) < 0.6
    start, muon = {"w": jnp.eye(3, 4)}, namespace["muon"]
    params, _ = scanned(muon, start, lambda params, step: params, 200)
    assert optax.tree.norm(params["w"][-1]) < optax.tree.norm(start)


MODEL = {"embedding": jnp.eye(3, 2), "w": jnp.eye(2, 3), "b": jnp.ones(3)}


def towards_zero(params, step):
    return params


def test_parameters_that_are_left_out_train_as_with_the_inner_optimizer():
    namespace = run_block("leave-out")
    plain, _ = scanned(optax.adamw(1e-3), MODEL, towards_zero, 60)
    for name in ("snoo", "average"):
        params, _ = scanned(namespace[name], MODEL, towards_zero, 60)
        for left_out in ("embedding", "b"):
            np.testing.assert_allclose(
                params[left_out], plain[left_out], rtol=1e-5, atol=1e-6
            )
        assert np.max(np.abs(params["w"] - plain["w"])) > 1e-4


def test_weights_that_keep_their_norm_have_it_after_every_sync():
    tx = run_block("retraction")["tx"]
    start = {"w": jnp.eye(2, 3), "b": jnp.ones(3)}
    params, state = scanned(tx, start, towards_zero, 90)
    synced = state.steps_since_sync == 0
    assert np.sum(synced) == 3
    norms = jnp.linalg.norm(params["w"], axis=(1, 2))
    # Where XLA compiles quickly, a square root or a quotient may have 12 bits.
    np.testing.assert_allclose(norms[synced], jnp.linalg.norm(start["w"]), rtol=1e-3)
    assert np.all(norms[~synced] < 0.999 * jnp.linalg.norm(start["w"]))
    assert np.all(params["b"][-1] < 1.0)  # vectors are not normalized


def test_where_norms_are_kept_a_matrix_of_zeros_can_start_to_move():
    tx, start = run_block("retraction")["tx"], {"w": jnp.zeros((2, 3))}

    def gradient(params, step):  # none in the first cycle
        return {"w": jnp.where(step < 30, 0.0, params["w"] - jnp.eye(2, 3))}

    params, _ = scanned(tx, start, gradient, 90)
    assert np.all(np.isfinite(params["w"]))
    norms = jnp.linalg.norm(params["w"], axis=(1, 2))
    assert norms[29] == 0.0
    np.testing.assert_allclose(norms[89], norms[59], rtol=1e-3)
    assert norms[89] > 0.1


def test_the_average_of_the_last_slow_weights_has_less_noise(capsys):
    run_block("tail-average")
    printed = re.fullmatch(r"slow (.+)\naverage (.+)\n", capsys.readouterr().out)
    slow, average = map(float, printed.groups())
    assert 0.0 < average < 0.5 * slow


def test_the_metrics_are_the_distances_of_two_loops(capsys):
    run_block("metrics")
    visited = two_loops_with_outer(
        optax.adam(0.1), optax.sgd(0.5), jnp.array([4.0, -2.0]), towards_zero, 3, 6
    )
    lines, last = "", 0.0
    for step, (fast, slow, _) in enumerate(visited, 1):
        if step % 3 == 0:  # the sync took half of it
            last = 2 * np.linalg.norm(slow - visited[step - 2][1])
        apart = np.linalg.norm(fast - slow)
        lines += f"step {step}: {apart:.3f} apart, last cycle {last:.3f}\n"
    assert capsys.readouterr().out == lines


@pytest.mark.skipif(not hasattr(jax, "memory"), reason="JAX 0.6 has no `jax.memory`")
def test_slow_weights_in_the_hosts_memory_are_where_the_page_says(capsys):
    namespace = run_block("host-memory")
    kind, slow = capsys.readouterr().out.split()
    assert kind == "pinned_host"
    np.testing.assert_allclose(float(slow), namespace["params"]["b"][0], rtol=1e-6)
    assert namespace["params"]["w"].sharding.memory_kind == "device"
    # 50 is a multiple of k.
    np.testing.assert_array_equal(
        namespace["params"]["b"],
        slow_params(namespace["opt_state"], namespace["params"])["b"],
    )


TESTS = [path.read_text() for path in ROOT.glob("tests/*/test_*.py")]
ASKING = "".join(text for text in TESTS if "run_block" in text)
OTHERS = [label for label in labelled_blocks() if f'"{label}"' not in ASKING]


@pytest.mark.parametrize("label", OTHERS)
def test_a_block_that_no_test_asks_for_runs(label, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block(label)


def test_every_block_of_python_has_a_label_of_its_own():
    blocks = all_blocks()
    assert len(blocks) >= 11
    unlabelled = [f"{b.page}:{b.line}" for b in blocks if b.label is None]
    assert not unlabelled, "write <!-- test: NAME --> on the line above each of these"
    labels = [block.label for block in blocks]
    assert len(set(labels)) == len(labels)
    # Any other label stands above no block.
    texts = [re.sub(LABELLED, "", page.read_text()) for page in TESTED]
    assert not [left for text in texts for left in re.findall(LABEL, text)]


def test_blocks_are_found_by_label_anywhere_on_a_page():
    text = """
1. In a list:

   <!-- test: in-a-list -->
   ```python
   x = 1
   if x:
       y = 2
   ```

```sh
python
```

```python
unlabelled = 1
```

<!-- test: not-directly-above -->

```py
"```"
```
"""
    found = python_blocks(text, "a.md")
    assert [(b.label, b.line) for b in found] == [
        ("in-a-list", 6),
        (None, 16),
        (None, 22),
    ]
    assert found[0].source == "x = 1\nif x:\n    y = 2\n"


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_the_two_lines_that_install_and_run_are_there(extra):
    what = {"examples": "examples/digits.py", "test": "-m pytest"}[extra]
    text = (ROOT / "README.md").read_text()
    line = f'python -m pip install -e ".[{extra}]" && python {what}'
    assert text.count(f"\n{line}\n") == 1


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_install_line_of_the_readme_brings_what_its_example_imports():
    text = (ROOT / "README.md").read_text()
    (extra,) = re.findall(r'pip install "optax-lookahead\[(\w+)\] @ ', text)
    requirements = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"][extra],
    ]
    brought = {re.match(r"[\w-]+", line)[0] for line in requirements}
    modules = set()
    for node in ast.walk(ast.parse(labelled_blocks()["linen"].source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "optax_lookahead"}
    assert {"flax", "sklearn"} <= modules
    distributions = importlib.metadata.packages_distributions()
    for module in modules:
        assert brought & set(distributions[module]), module


def test_the_readme_names_the_oldest_versions_that_are_supported():
    text = (ROOT / "README.md").read_text()
    least = dict(line.split(">=") for line in PROJECT["dependencies"])
    python = PROJECT["requires-python"].removeprefix(">=")
    examples = dict(
        line.split(">=") for line in PROJECT["optional-dependencies"]["examples"]
    )
    wanted = (
        f"Python {python}, JAX {least['jax']} and Optax {least['optax']}, or newer. "
        f"Programs with Flax NNX need Flax {examples['flax']}."
    )
    assert wanted in " ".join(text.split())


def headings(page):
    titles = re.findall(r"^#+ (.+)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}


def links(page):
    return re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_headings_that_a_page_points_to_exist(page):
    for link in links(page):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@pytest.mark.parametrize(
    ("page", "picture"),
    [
        ("README.md", "examples/digits.png"),
        ("examples/README.md", "noisy_quadratic.png"),
        ("benchmarks/README.md", "scaling.png"),
    ],
)
def test_a_page_shows_its_picture(page, picture):
    assert picture in links(ROOT / page)
