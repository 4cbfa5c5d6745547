"""Is the outer optimizer called as Optax calls any optimizer?

Derivatives, NaN checks, named scopes, callbacks, and Python branches in an eager loop
must work in it.
"""

import functools
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.compiling import as_shipped
from helpers.rows import slow_but
from jax.experimental import checkify

from optax_lookahead import lookahead, outer_loop

K, STEPS = 2, 5
START = {"w": np.array([[1.0, -0.5, 2.0]]), "b": np.array([0.3, -1.2])}
# An optimizer's second hyperparameter is the first of these that it has.
SECOND = ("momentum", "b1", "decay", "beta1", "weight_decay")
# Cannot be outer optimizers: they need a loss, a second gradient, or a gradient of the
# loss in place of a pseudo-gradient.
NOT_OUTER = {
    "adamw_bf16",
    "lbfgs",
    "momo",
    "momo_adam",
    "noisy_sgd",
    "optimistic_adam",  # deprecated
    "polyak_sgd",
    "sam",
    "sophia",
}


def constructors():
    found = {}
    for module in (optax, optax.contrib):
        for name, make in vars(module).items():
            if not inspect.isfunction(make) or name in NOT_OUTER:
                continue
            if name.startswith(("scale_by", "inject", "opaque")):
                continue
            arguments = inspect.signature(make).parameters
            required = {
                a for a, p in arguments.items() if p.default is inspect.Parameter.empty
            }
            kinds = {p.kind for p in arguments.values()}
            if inspect.Parameter.VAR_KEYWORD in kinds:
                continue
            if "learning_rate" in arguments and required <= {"learning_rate"}:
                second = [a for a in SECOND if a in arguments][:1]
                found[name] = make, ["learning_rate", *second]
    return found


OUTERS = constructors()
NAMES = sorted(OUTERS)
IN_THE_LINE = ["adam", "sgd"]
every_outer = pytest.mark.parametrize("name", slow_but(IN_THE_LINE, NAMES))


def gradient(params, step):
    return jax.tree.map(lambda p: p - jnp.cos(step + p), params)


def loss(params):
    return sum(jnp.sum(p**3) for p in jax.tree.leaves(params))


def optimizers(name, x):
    """Returns both, of hyperparameters (outer rate, second, inner rate, start)."""
    make, arguments = OUTERS[name]
    outer = make(**dict(zip(arguments, (x[0], x[1]), strict=False)))
    return optax.sgd(x[2], momentum=0.5), outer


def start(x):
    return jax.tree.map(lambda p: x[3] * jnp.asarray(p), START)


def by_hand(name, x):
    inner, outer = optimizers(name, x)
    slow = start(x)
    state, outer_state = inner.init(slow), outer.init(slow)
    fast = slow
    for step in range(STEPS):
        updates, state = inner.update(gradient(fast, step), state, fast)
        fast = optax.apply_updates(fast, updates)
        if (step + 1) % K == 0:
            pseudo_grads = jax.tree.map(jnp.subtract, slow, fast)
            updates, outer_state = outer.update(pseudo_grads, outer_state, slow)
            fast = slow = optax.apply_updates(slow, updates)
    return loss(fast)


def ours(name, x):
    tx = outer_loop(*optimizers(name, x), K)
    params = start(x)

    def one(carry, step):
        params, state = carry
        updates, state = tx.update(gradient(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), jnp.arange(STEPS))
    return loss(params)


AT = np.array([0.3, 0.4, 0.1, 1.1])


def test_discovery_finds_the_optimizers_that_can_be_outer_ones():
    assert set(NAMES) >= {"adam", "sgd", "adamax", "lamb", "adabelief", "prodigy"}
    assert len(NAMES) >= 35


# Its derivatives are NaN at its third call, also in plain loops, where that call comes
# one step later.
NAN_AT_THE_THIRD_CALL = "radam"
# Its first call computes `max(0, 0)`, where rounding decides between two derivatives.
ON_A_KINK = "cocob"


@every_outer
def test_derivatives_are_those_of_two_plain_loops(x64, monkeypatch, name):
    jit = (lambda f: f) if name == ON_A_KINK else jax.jit
    if name == NAN_AT_THE_THIRD_CALL:
        monkeypatch.setattr(sys.modules[__name__], "STEPS", 3 * K)
        assert not np.isfinite(jax.grad(functools.partial(by_hand, name))(AT)).any()
        monkeypatch.setattr(sys.modules[__name__], "STEPS", 2 * K)
    try:
        expected = jit(jax.value_and_grad(functools.partial(by_hand, name)))(AT)
    except (jax.errors.ConcretizationTypeError, TypeError, ValueError, NameError):
        # Not of traced hyperparameters: then of the inner rate and the start.
        def fixed(loop, x):
            return loop(name, [*AT[:2], *x])

        expected = jax.jit(jax.value_and_grad(functools.partial(fixed, by_hand)))(
            AT[2:]
        )
        got = jax.jit(jax.value_and_grad(functools.partial(fixed, ours)))(AT[2:])
    else:
        got = jit(jax.value_and_grad(functools.partial(ours, name)))(AT)
    for x, y in zip(got, expected, strict=True):
        known = np.isfinite(y)  # DoG has no derivative by the start, by hand either
        assert np.all(known) or name in ("dog", "dowg")
        x, y = np.asarray(x)[known], np.asarray(y)[known]
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9 * np.max(np.abs(y)))


@pytest.mark.slow
def test_derivatives_for_a_batch_of_hyperparameters_are_those_of_two_plain_loops(x64):
    several = np.stack([AT, AT * 0.9, AT * 1.1])
    for name in ("adam", "sgd"):
        expected = [
            jax.jit(jax.grad(functools.partial(by_hand, name)))(x) for x in several
        ]
        got = jax.jit(jax.vmap(jax.grad(functools.partial(ours, name))))(several)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def warm_up(eps_root, loop):
    """Returns the derivative by the outer rate if nothing moves in the first cycle."""

    def final(rate):
        inner = optax.sgd(lambda count: jnp.where(count < K, 0.0, 0.1))
        return loop(inner, optax.adam(rate, eps_root=eps_root))

    return jax.jit(jax.grad(final))(0.3)


def test_a_pseudo_gradient_of_zero_needs_an_eps_root_as_in_two_plain_loops(x64):
    def two_loops(inner, outer):
        slow = fast = start(AT)
        state, outer_state = inner.init(slow), outer.init(slow)
        for step in range(4):
            updates, state = inner.update(gradient(fast, step), state, fast)
            fast = optax.apply_updates(fast, updates)
            if step % 2:
                pseudo_grads = jax.tree.map(jnp.subtract, slow, fast)
                updates, outer_state = outer.update(pseudo_grads, outer_state, slow)
                fast = slow = optax.apply_updates(slow, updates)
        return loss(fast)

    def one_loop(inner, outer):
        tx, params = outer_loop(inner, outer, K), start(AT)
        state = tx.init(params)
        for step in range(4):
            updates, state = tx.update(gradient(params, step), state, params)
            params = optax.apply_updates(params, updates)
        return loss(params)

    assert np.isfinite(warm_up(1e-8, one_loop))
    np.testing.assert_allclose(warm_up(1e-8, one_loop), warm_up(1e-8, two_loops))


def stepper(name):
    tx = outer_loop(*optimizers(name, AT), K)

    def step(params, state, i):
        updates, state = tx.update(gradient(params, i), state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def raises_alone(name):
    """Returns whether the outer optimizer computes a NaN, given ones between syncs."""
    _, outer = optimizers(name, AT)
    params = start(AT)
    state, update = outer.init(params), jax.jit(outer.update)
    for step in range(STEPS):
        size = 0.1 if step % K else 1.0
        grads = jax.tree.map(lambda p, size=size: jnp.full_like(p, size), params)
        try:
            _, new = update(grads, state, params)
        except FloatingPointError:
            return True
        state = new if step % K else state
    return False


@every_outer
def test_nan_checks_find_only_what_they_find_in_the_outer_optimizer_alone(name):
    tx, step = stepper(name)
    step = jax.jit(step)
    with jax.debug_nans(True):
        alone = raises_alone(name)
        params = start(AT)
        state = tx.init(params)
        try:
            for i in range(STEPS):
                params, state = jax.block_until_ready(step(params, state, i))
        except FloatingPointError:
            assert alone, "the outer optimizer alone computes no NaN"


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_checkify_finds_only_what_it_finds_in_the_outer_optimizer_alone(name):
    tx, step = stepper(name)
    checked = jax.jit(checkify.checkify(step, errors=checkify.float_checks))
    params = start(AT)
    state = tx.init(params)
    for i in range(STEPS):
        error, (params, state) = checked(params, state, i)
        error.throw()


def as_outer(update, init=lambda params: ()):
    return optax.GradientTransformation(init, update)


def test_a_named_scope_inside_it_is_in_the_compiled_program():
    def update(updates, state, params=None):
        with jax.named_scope("the_slow_step"):
            return jax.tree.map(lambda g: -0.5 * g, updates), state

    tx = outer_loop(optax.sgd(0.1), as_outer(update), 2)
    params = jnp.ones(3)
    lowered = as_shipped(tx.update).lower(params, tx.init(params), params)
    assert "the_slow_step" in lowered.compile().as_text()


def falling(count):
    return float(np.exp(-float(count)))  # NumPy, for which nothing may be a tracer


def branching(grads, state, params=None):
    # Python decides, in an eager loop.
    size = float(jnp.sum(jax.tree.leaves(grads)[0] ** 2))
    rate = 0.5 if size > 0.1 else falling(state)
    return jax.tree.map(lambda g: -rate * g, grads), state + 1


def test_python_branches_and_numpy_schedules_work_in_an_eager_loop():
    eager = as_outer(branching, lambda params: jnp.zeros([], jnp.int32))
    for tx in (
        outer_loop(optax.sgd(0.1), eager, 2),
        outer_loop(optax.sgd(falling), optax.sgd(falling), 2),
        outer_loop(eager, optax.sgd(0.5), 2),
        lookahead(eager, 2, falling),
    ):
        params = jnp.ones(3)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        assert np.all(np.isfinite(params))
        assert state.sync_count == 2
    # The same branch by hand.
    slow, count = np.ones(3), 0
    for _ in range(2):
        fast = slow * 0.9 * 0.9
        pseudo_grad = slow - fast
        rate = 0.5 if np.sum(pseudo_grad**2) > 0.1 else falling(count)
        slow, count = slow - rate * pseudo_grad, count + 1
    tx = outer_loop(optax.sgd(0.1), eager, 2)
    params = jnp.ones(3)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, slow, rtol=1e-6)


def test_invariants_of_its_state_hold_in_every_call():
    # Two counters that are always one apart, and a sum that its parts add up to.
    def update(updates, state, params=None):
        low, high, parts, total = state
        checkify.check(high == low + 1, "the counters disagree")
        checkify.check(jnp.allclose(jnp.sum(parts), total), "the sum is wrong")
        parts = parts + jnp.abs(updates)
        return -0.5 * updates, (low + 1, high + 1, parts, jnp.sum(parts))

    def init(params):
        return jnp.int32(0), jnp.int32(1), jnp.zeros(3), jnp.zeros([])

    tx = outer_loop(optax.sgd(0.1), as_outer(update, init), 3)
    step = jax.jit(checkify.checkify(tx.update))
    params = jnp.asarray([1.0, 2.0, 3.0])
    state = tx.init(params)
    for _ in range(7):
        error, (updates, state) = step(params, state, params)
        error.throw()
        params = optax.apply_updates(params, updates)
    assert state.outer_state[0] == 2


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_ordered_callbacks_inside_it_run_once_in_every_update(transform):
    seen = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda x: seen.append(int(x)), state, ordered=True)
        return jax.tree.map(lambda g: -0.5 * g, updates), state + 1

    outer = as_outer(update, lambda params: jnp.zeros([], jnp.int32))
    tx = outer_loop(optax.sgd(0.1), outer, 2)
    step = transform(tx.update)
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(5):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    jax.effects_barrier()
    assert seen == [0, 0, 1, 1, 2]  # the number of syncs before each update


def test_its_own_arguments_reach_it_alone_and_override_a_shared_name():
    seen = {}

    def recorder(name):
        def update(updates, state, params=None, **extra_args):
            extra_args.pop("inner_step", None)
            seen[name] = extra_args
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    tx = outer_loop(recorder("inner"), recorder("outer"), 2)
    params = jnp.ones(2)
    state = tx.init(params)
    tx.update(params, state, params, value=1, both=2)
    assert seen == {"inner": {"value": 1, "both": 2}, "outer": {"value": 1, "both": 2}}
    tx.update(params, state, params, value=1, outer_args={"value": 3, "own": 4})
    assert seen == {"inner": {"value": 1}, "outer": {"value": 3, "own": 4}}
    with pytest.raises(TypeError, match="`outer_args` must be a dict"):
        tx.update(params, state, params, outer_args=5)
    with pytest.raises(ValueError, match="`inner_step` must not be an extra argument"):
        tx.update(params, state, params, outer_args={"inner_step": 5})
