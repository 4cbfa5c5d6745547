"""The process of one framework in `peers.py`: optimizers, alone and inside Lookahead.

Each framework runs in a separate process, which reads requests as lines of JSON from
its standard input and answers each with one line. It imports nothing but its framework,
so it also runs in another Python environment.

    python benchmarks/peers.py       # starts it
"""

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

ALPHA = 0.5
RATES = {"adam": 1e-3, "sgd": 1e-3}
INNER_ALONE = "inner alone"


class Form:
    """An optimizer with the parameters that it moves, one step at a time."""

    grads: list  # arrays of the framework, the same for all forms

    def step(self) -> None:
        """Returns when the parameters have their new values."""
        raise NotImplementedError

    def values(self) -> list[np.ndarray]:
        raise NotImplementedError

    def traces(self) -> int:
        """Returns how often the step was compiled; eager ones never are."""
        return 0


def explain(error: Exception, remedy: str) -> str:
    """Says in one line why a package cannot be imported."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {remedy.format(error.name)}"
    return f"does not import: {error}".splitlines()[0]


class Framework:
    """One framework, and the packages that could not be imported."""

    packages: tuple[str, ...]  # whose versions are reported
    remedy = "pip install {}"

    def __init__(self):
        self.missing: list[str] = []

    def array(self, value: np.ndarray) -> Any:
        raise NotImplementedError

    def live_bytes(self) -> int:
        """Returns the bytes of all arrays that this process holds."""
        raise NotImplementedError

    def forms(
        self, inner: str, rate: float, params: list[np.ndarray], k: int
    ) -> Iterator[tuple[str, str, Form]]:
        """Yields a variant of the inner optimizer, a form and its instance."""
        raise NotImplementedError


class Jax(Framework):
    packages = ("jax", "optax")

    def __init__(self):
        super().__init__()
        import jax
        import optax

        from optax_lookahead import lookahead

        self.jax, self.optax, self.lookahead = jax, optax, lookahead

    def array(self, value):
        return self.jax.numpy.asarray(value)

    def live_bytes(self):
        return sum(array.nbytes for array in self.jax.live_arrays())

    def forms(self, inner, rate, params, k):
        tx = {"adam": self.optax.adam, "sgd": self.optax.sgd}[inner](rate)
        synced = self.optax.LookaheadParams.init_synced
        for name, form_tx, wrap in (
            (INNER_ALONE, tx, lambda params: params),
            ("optax_lookahead", self.lookahead(tx, k, ALPHA), lambda params: params),
            ("optax.lookahead", self.optax.lookahead(tx, k, ALPHA), synced),
        ):
            yield "jit", name, JaxForm(self.jax, self.optax, form_tx, params, wrap)


class JaxForm(Form):
    def __init__(self, jax, optax, tx, params, wrap):
        self.jax, self.count = jax, 0

        def step(params, state, grads):
            self.count += 1
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.jitted = jax.jit(step, donate_argnums=(0, 1))
        # Copies of the pairs too, since fast and slow start as the same arrays.
        self.params = jax.tree.map(
            lambda p: jax.numpy.array(p, copy=True), wrap(list(params))
        )
        self.state = tx.init(self.params)

    def step(self):
        self.params, self.state = self.jitted(self.params, self.state, self.grads)
        self.jax.block_until_ready((self.params, self.state))

    def values(self):
        return [np.asarray(p) for p in getattr(self.params, "fast", self.params)]

    def traces(self):
        return self.count


class Torch(Framework):
    packages = ("torch", "pytorch_optimizer", "timm", "torch_optimizer")

    def __init__(self):
        super().__init__()
        import torch

        self.torch = torch
        wrappers = {
            "pytorch_optimizer": "pytorch_optimizer",
            "timm": "timm.optim",
            "torch_optimizer": "torch_optimizer",
        }
        self.wrappers = {}
        for package, module in wrappers.items():
            try:
                self.wrappers[package] = importlib.import_module(module).Lookahead
            except Exception as error:  # a peer may also be installed and broken
                self.missing.append(f"{package}: {explain(error, self.remedy)}")

    def array(self, value):
        return self.torch.tensor(value)

    def live_bytes(self):
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), self.torch.Tensor):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def forms(self, inner, rate, params, k):
        optimizer = {"adam": self.torch.optim.Adam, "sgd": self.torch.optim.SGD}[inner]
        wrappers = {INNER_ALONE: lambda optimizer, **_: optimizer, **self.wrappers}
        for variant, flags in {
            "fused": {"fused": True},
            "foreach": {"foreach": True},
            "loop": {"foreach": False, "fused": False},  # the default on a CPU
        }.items():
            for name, wrapper in wrappers.items():
                tensors = [self.torch.tensor(p, requires_grad=True) for p in params]
                inside = optimizer(tensors, lr=rate, **flags)
                yield (
                    variant,
                    name,
                    TorchForm(tensors, wrapper(inside, k=k, alpha=ALPHA)),
                )


class TorchForm(Form):
    def __init__(self, tensors, optimizer):
        self.tensors, self.optimizer = tensors, optimizer

    def step(self):
        for tensor, grad in zip(self.tensors, self.grads, strict=True):
            tensor.grad = grad
        self.optimizer.step()

    def values(self):
        return [tensor.detach().numpy().copy() for tensor in self.tensors]


class TensorFlow(Framework):
    packages = ("tensorflow", "tensorflow-cpu", "tensorflow-addons")
    remedy = (
        "pip install tensorflow-addons tensorflow-cpu==2.15.1 in a separate "
        "environment (it needs NumPy 1), then --tensorflow-python"
    )

    def __init__(self):
        super().__init__()
        import tensorflow
        from tensorflow_addons.optimizers import Lookahead

        self.tf, self.lookahead = tensorflow, Lookahead

    def array(self, value):
        return self.tf.constant(value)

    def live_bytes(self):
        return sum(
            variable.dtype.size * variable.shape.num_elements()
            for variable in gc.get_objects()
            if issubclass(type(variable), self.tf.Variable)
        )

    def forms(self, inner, rate, params, k):
        # The only optimizers that it can wrap.
        legacy = self.tf.keras.optimizers.legacy
        for name in (INNER_ALONE, "tensorflow-addons"):
            optimizer = {
                "adam": lambda: legacy.Adam(rate, epsilon=1e-8),
                "sgd": lambda: legacy.SGD(rate),
            }[inner]()
            if name != INNER_ALONE:
                optimizer = self.lookahead(
                    optimizer, sync_period=k, slow_step_size=ALPHA
                )
            yield "tf.function", name, TensorFlowForm(self.tf, optimizer, params)


class TensorFlowForm(Form):
    def __init__(self, tf, optimizer, params):
        self.variables = [tf.Variable(p) for p in params]

        @tf.function
        def step(grads):
            optimizer.apply_gradients(zip(grads, self.variables, strict=True))

        self.function, self.optimizer = step, optimizer

    def step(self):
        self.function(self.grads)

    def values(self):
        return [variable.numpy() for variable in self.variables]

    def traces(self):
        return self.function.experimental_get_tracing_count()


class Session:
    """Answers the requests of `peers.py`, each a method and its arguments."""

    def __init__(self, framework: Framework):
        self.framework = framework
        self.forms: dict[str, Form] = {}

    def describe(self) -> dict:
        versions = {}
        for package in self.framework.packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"versions": versions, "missing": self.framework.missing}

    def check(
        self,
        inner: str,
        rate: float,
        k: int,
        steps: int,
        params: list[list[float]],
        targets: list[list[float]],
    ) -> dict[str, list]:
        """Returns the parameters after every step of descending to the targets."""
        start = [np.array(p, np.float32) for p in params]
        trajectories = {}
        for variant, name, form in self.framework.forms(inner, rate, start, k):
            trajectory = trajectories[f"{variant}/{name}"] = []
            for _ in range(steps):
                form.grads = [
                    self.framework.array((p - np.array(target)).astype(np.float32))
                    for p, target in zip(form.values(), targets, strict=True)
                ]
                form.step()
                trajectory.append(np.concatenate(form.values()).tolist())
        return trajectories

    def build(self, inner: str, leaves: int, size: int, k: int) -> dict[str, int]:
        """Makes and warms up all forms; returns the bytes that each holds."""
        self.forms = {}
        gc.collect()
        rng = np.random.default_rng(0)
        params, grads = rng.standard_normal((2, leaves, size), np.float32)
        arrays = [self.framework.array(g) for g in grads]
        held, before = {}, self.framework.live_bytes()
        for variant, name, form in self.framework.forms(
            inner, RATES[inner], list(params), k
        ):
            form.grads = arrays
            for _ in range(2 * k):  # compiles, and creates what a sync creates
                form.step()
            gc.collect()
            after = self.framework.live_bytes()
            self.forms[f"{variant}/{name}"] = form
            held[f"{variant}/{name}"], before = after - before, after
        self.traces = {name: form.traces() for name, form in self.forms.items()}
        return held

    def round(self, k: int, backwards: bool) -> dict[str, list[float]]:
        """Returns the seconds of each step of one cycle of each form."""
        times: dict[str, list[float]] = {}
        names = list(self.forms)
        for name in reversed(names) if backwards else names:
            step, times[name] = self.forms[name].step, []
            for _ in range(k):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        if self.traces != {name: form.traces() for name, form in self.forms.items()}:
            raise RuntimeError("a step was compiled again while it was timed.")
        return times


def main() -> None:
    # Replies use a separate file, since libraries may print when they are imported.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    framework = {"jax": Jax, "torch": Torch, "tensorflow": TensorFlow}[sys.argv[1]]
    try:
        session = Session(framework())
    except Exception as error:
        answer = {"error": explain(error, framework.remedy)}
        print(json.dumps(answer), file=replies, flush=True)
        return
    for line in sys.stdin:
        request, arguments = json.loads(line)
        try:
            answer = getattr(session, request)(**arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
