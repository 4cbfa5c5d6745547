"""Are the figures on the pages those of the files in `benchmarks/results/`?

For each page, functions write what the page should say, with the figures of the files;
what it does not say fails, and is printed. Figures that no file holds, such as those of
an earlier version, are not checked.
"""

import functools
import json
import re

import pytest
from helpers.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
REAL_MODELS = "ResNet", "transformer"
OURS, NESTEROV, UPSTREAM = (
    "optax_lookahead",
    "optax_lookahead, Nesterov outer",
    "optax.lookahead",
)
RESET, INTERPOLATE = f"{OURS}, reset", f"{OURS}, interpolate"
ALONE, AGAIN = "inner alone", "inner alone, again"


@functools.cache
def files():
    return {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}


class Results:
    """The rows of the files, and what the pages say of them."""

    def __init__(self, results):
        self.results = results

    def rows(self, name, **columns):
        return [
            row
            for row in self.results[name]["rows"]
            if all(row.get(column) == value for column, value in columns.items())
        ]

    def row(self, name, **columns):
        (row,) = self.rows(name, **columns)
        return row

    def gpu(self, form, inner="adam", dtype="float32", leaves=20, task="step alone"):
        leaves = leaves if task == "step alone" else 12
        where = {"inner": inner, "dtype": dtype, "leaves": leaves, "task": task}
        return self.row("gpu", form=form, k=5, **where)

    def gpu_time(self, form, *inners, spec=".3f", **where):
        ratios = (self.gpu(form, inner, **where)["ratio"][1] for inner in inners)
        return ", ".join(f"{ratio:{spec}}" for ratio in ratios)

    def gpu_floor(self, form, inner, **where):
        row, alone = (self.gpu(f, inner, **where) for f in (form, ALONE))
        return row["floor"] / alone["floor"]

    def gpu_more(self, form):
        row, alone = (self.gpu(f) for f in (form, ALONE))
        return f"{(row['temporary'] - alone['temporary']) / row['n']:.2f}"

    def gpu_cases(self):
        cases = {}
        for row in self.rows("gpu"):
            cases.setdefault(row["case"], {})[row["form"]] = row
        return list(cases.values())

    def step(self, form, inner, slice_="inners", **where):
        where = {"leaves": 20, "size": 500_000, "k": 5} | where
        return self.row("step_cost", form=form, inner=inner, slice=slice_, **where)

    def step_time(self, form, *inners, spec=".2f", **where):
        ratios = (self.step(form, i, **where)["ratio"]["median"] for i in inners)
        return ", ".join(f"{ratio:{spec}}" for ratio in ratios)

    def step_temporary(self, form, *inners, spec=".2f", **where):
        rows = (self.step(form, inner, **where) for inner in inners)
        return ", ".join(f"{row['temporary'] / row['n']:{spec}}" for row in rows)

    def training(self, form, task, inner):
        (row,) = (
            row
            for row in self.rows("training_step", form=form, inner=inner)
            if row["task, parameters"].startswith(task)
        )
        return row

    def training_time(self, form, task):
        rows = (self.training(form, task, inner) for inner in ("adamw", "momentum"))
        return ", ".join(median(row) for row in rows)

    def training_range(self, form, column="time / inner (quartiles)"):
        """Returns the range of ResNet-18 and the transformers; compiling, of all."""
        values = [
            float(row[column].split()[0])
            for row in self.rows("training_step", form=form)
            if column.startswith("compile")
            or row["task, parameters"].startswith(REAL_MODELS)
        ]
        return f"{min(values):.2f} to {max(values):.2f}"

    def dense(self, form, column):
        rows = (self.training(form, "20 dense", i) for i in ("adamw", "momentum"))
        return [float(row[column].split()[0]) for row in rows]

    def again(self, tasks=("",)):
        """Returns how far a second run of the inner optimizer is off the first."""
        off = (
            abs(float(median(row)) - 1)
            for row in self.rows("training_step", form=AGAIN)
            if row["task, parameters"].startswith(tasks)
        )
        return f"{max(off):.2f}"

    def tpu(self, form, inner="adam", model="grows", column="hbm"):
        """Returns the figures on 4 and on 256 chips, or one if they are the same."""
        rows = (
            self.row("tpu_aot", form=form, inner=inner, model=model, slice=slice_)
            for slice_ in ("2x2", "16x16")
        )
        texts = [f"{row[column]:.2f}" for row in rows]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    def tpu_more(self, form, inner="adam", column="hbm", spec=".2f"):
        rows = (
            [
                self.row("tpu_aot", form=f, inner=inner, model="grows", slice=slice_)
                for f in (form, ALONE)
            ]
            for slice_ in ("2x2", "16x16")
        )
        (text,) = {f"{row[column] - alone[column]:{spec}}" for row, alone in rows}
        return text

    def peers(self, form, variant="jit"):
        rows = (
            self.row("peers", form=form, variant=variant, inner=inner, size=500_000)
            for inner in ("adam", "sgd")
        )
        return ", ".join(f"{row['ratio']:.2f}" for row in rows)

    def cpu_range(self, form, inner, spec):
        times = self.cpu_times(form, inner)
        return f"{min(times):{spec}} to {max(times):{spec}}"

    def cpu_times(self, form, inner):
        """Returns the times of 20 x 500,000 float32, wherever they were measured."""
        where = {"form": form, "inner": inner, "size": 500_000}
        alone = self.rows("step_cost", leaves=20, dtype="float32", **where)
        peers = self.rows("peers", framework="jax", **where)
        return [
            *(row["ratio"]["median"] for row in alone if row["slice"] != "policies"),
            *(row["ratio"] for row in peers),
        ]

    def held(self, form):
        """Returns the copies of float32 parameters that it holds beside Adam's."""
        row, alone = (
            self.row("memory", parameters="float32", inner="adam", form=f)
            for f in (form, ALONE)
        )
        return f"{(float(row['held']) - float(alone['held'])) / 4:.0f}"


def median(row):
    return row["time / inner (quartiles)"].split()[0]


def cells(*values):
    return f"| {' | '.join(values)} |"


def cost_for_users(r):
    transformer, layers = {"task": "transformer"}, {"task": "12 layers"}
    many = {"leaves": 400}
    for label, inners, where, spec in (
        ("training step of a transformer of 100 M parameters, AdamW", ["adamw"],
         transformer, ".3f"),
        ("training step of 12 square layers, Adam, SGD", ["adam", "sgd"],
         layers, ".2f"),
        ("optimizer step alone, Adam, SGD", ["adam", "sgd"], {}, ".3f"),
    ):  # fmt: skip
        times = (r.gpu_time(f, *inners, spec=spec, **where) for f in (OURS, NESTEROV))
        yield cells(label, *times)
    times = (
        "{1:.2f} ({0:.2f} to {2:.2f})".format(*r.gpu(f, **many)["ratio"])
        for f in (OURS, NESTEROV)
    )
    yield cells("the same in 400 arrays, Adam", *times)
    traffic = (
        f"+ {r.tpu_more(f, 'adam')} N, + {r.tpu_more(f, 'sgd')} N"
        for f in (OURS, NESTEROV)
    )
    what = "HBM traffic of a step, Adam, SGD; on 4 or 256 chips, for the same N"
    yield cells(what, *traffic)

    for label, task in (
        ("ResNet-18, AdamW, momentum", "ResNet-18"),
        ("a transformer of 1.8 M parameters", "transformer, 16 x 256"),
        ("a transformer of 0.14 M parameters", "transformer, 16 x 32"),
        ("20 dense layers", "20 dense"),
    ):
        times = (r.training_time(f, task) for f in (OURS, NESTEROV))
        yield cells(f"training step of {label}", *times)
    one, two = (r.held(f) for f in ('lookahead, "keep"', "outer_loop, Nesterov"))
    yield f"| held between steps | + {one} N | + {two} N |"
    more = (r.tpu_more(f, column="temporary") for f in (OURS, NESTEROV))
    yield cells(
        "temporaries of a step alone on a TPU, Adam", *(f"+ {each} N" for each in more)
    )
    more = (r.gpu_more(f) for f in (OURS, NESTEROV))
    yield cells(
        "temporaries of a step alone on a GPU, Adam", *(f"+ {each} N" for each in more)
    )
    texts = (
        [r.step_temporary(f, inner, spec=".1f") for inner in ("adam", "sgd")]
        for f in (OURS, NESTEROV)
    )
    yield cells(
        "temporaries of a step alone on a CPU, Adam, SGD",
        *(f"+ {adam} N, + {sgd} N" for adam, sgd in texts),
    )
    tasks = "ResNet-18", "transformer, 16 x 256", "20 dense"
    column = "temporaries - inner's, N"
    yield cells(
        "temporaries of a training step on a CPU, AdamW: ResNet-18, transformer of "
        "1.8 M parameters, 20 dense layers",
        *(
            ", ".join(r.training(f, task, "adamw")[column] for task in tasks) + " N"
            for f in (OURS, NESTEROV)
        ),
    )
    ranges = (r.training_range(f, "compile time / inner") for f in (OURS, NESTEROV))
    yield cells("training steps, CPU", *ranges)
    policy = functools.partial(r.step_time, slice_="policies")
    copied = r.step_temporary(INTERPOLATE, "adam", spec=".1f", slice_="policies")
    yield f"+ {copied} N of temporaries around Adam"
    yield (
        f"a step alone takes {policy(INTERPOLATE, 'adam')} and {policy(RESET, 'adam')} "
        "times Adam's. In whole training steps they take "
        f"{r.training_range(INTERPOLATE)} and {r.training_range(RESET)} times with "
        "ResNet-18 and transformers"
    )
    yield (
        f"a second run of the inner optimizer differs by up to {r.again(REAL_MODELS)} "
        f"with ResNet-18 and transformers, {r.again()} with dense layers"
    )


def cost_for_contributors(r):
    inners = "adam", "momentum", "sgd"
    floors = ", ".join(f"{r.gpu_floor(OURS, inner):.3f}" for inner in inners)
    yield cells(
        "**GPU** (H200): a step of Adam, momentum, SGD, time / inner",
        f"{r.gpu_time(OURS, *inners)}; "
        f"bfloat16 {r.gpu_time(OURS, *inners, dtype='bfloat16')}",
        f"within 5 % of {floors}",
    )
    floors = ", ".join(f"{r.gpu_floor(NESTEROV, i):.3f}" for i in ("adam", "sgd"))
    yield cells(
        "GPU: Nesterov around Adam, SGD",
        r.gpu_time(NESTEROV, "adam", "sgd"),
        f"within 5 % of {floors}",
    )
    steps, whole = [], []
    for forms in r.gpu_cases():
        ours, alone = forms[OURS], forms[ALONE]
        more = (ours["temporary"] - alone["temporary"]) / alone["n"]
        (steps if ours["task"] == "step alone" else whole).append(more)
    yield (
        f"| {max(steps):.2f} N in {len(steps)} steps alone; "
        f"whole steps up to {max(whole):.2f} N | 0 |"
    )
    one = {"task": "transformer"}
    yield (
        f"| {r.gpu_time(OURS, 'adamw', **one)}; "
        f"Nesterov {r.gpu_time(NESTEROV, 'adamw', **one)} | 1.01 |"
    )
    twelve = r.gpu_time(OURS, "adam", "sgd", task="12 layers", spec=".2f")
    yield f"GPU: whole step of 12 square layers, Adam, SGD | {twelve} | 1.01 |"
    low, middle, high = r.gpu(OURS, leaves=400)["ratio"]
    yield f"GPU: 400 leaves, Adam | {middle:.2f} ({low:.2f} to {high:.2f}) |"
    over = [
        forms[OURS]["ratio"][1] / forms[UPSTREAM]["ratio"][1] for forms in r.gpu_cases()
    ]
    missed = sum(ratio > 1.01 for ratio in over)
    yield (
        f"| {min(over):.3f} to {max(over):.3f} | 1.01 | "
        f"**missed** by {missed} of {len(over)} |"
    )
    branch = [
        forms["lax.cond in the loop"]["ratio"][1] / forms[OURS]["ratio"][1]
        for forms in r.gpu_cases()
        if forms[OURS]["task"] != "step alone"
    ]
    yield f"over lookahead | {min(branch):.2f} to {max(branch):.2f} | not below"
    yield f"inner + {r.tpu_more(OURS)} N, on 4 chips as on 256 |"
    columns = (("temporary", ".0f"), ("collectives", "d"), ("fusions", "d"))
    counts = [r.tpu_more(OURS, column=name, spec=spec) for name, spec in columns]
    yield f"temporaries, collectives, kernels more | {', '.join(counts)} |"
    yield (
        f"TPU: Nesterov around Adam | inner + {r.tpu_more(NESTEROV)} N; bfloat16 with "
        f"float32 moments inner + {r.tpu_more(NESTEROV, 'adam, bf16')} N"
    )
    yield f"**missed**; + {r.tpu_more(NESTEROV, 'sgd')} N around SGD"
    yield f"step alone: Adam, momentum, SGD | {r.step_time(OURS, *inners)};"
    yield (
        f"Nesterov around Adam, momentum, SGD | {r.step_time(NESTEROV, *inners)} "
        "(with 0.2: 6.88, 8.16, 14.61); temporaries "
        f"{r.step_temporary(NESTEROV, *inners)} N"
    )
    half = functools.partial(r.step_time, slice_="dtypes")
    (none,) = {r.step_temporary(OURS, i, slice_="dtypes", spec=".0f") for i in inners}
    yield (
        f"bfloat16: Adam, momentum, SGD | {half(OURS, *inners)} "
        f"(`optax.lookahead` {half(UPSTREAM, *inners)}); {none} temporaries"
    )
    small = r.step_time(OURS, "adam", slice_="sizes", size=50)
    many = r.step_time(OURS, "adam", slice_="leaves", leaves=2000, size=5000)
    yield f"20 x 50 floats; 2,000 leaves of 5,000 | {small}; {many} |"
    policies = []
    for inner in ("adam", "momentum"):
        stored = (
            r.step_temporary(f, inner, spec=".1f", slice_="policies")
            for f in (RESET, INTERPOLATE)
        )
        times = (r.step_time(f, inner, slice_="policies") for f in (RESET, INTERPOLATE))
        policies += [" and ".join(stored), " and ".join(times)]
    yield ("| Adam: temporaries {} N, time {}; momentum: {} N, {} |".format(*policies))
    large, small = "transformer, 16 x 256", "transformer, 16 x 32"
    yield f"ResNet-18, AdamW, momentum | {r.training_time(OURS, 'ResNet-18')} | 1.01"
    yield (
        f"of 1.8 M; of 0.14 M | {r.training_time(OURS, large)}; "
        f"{r.training_time(OURS, small)} |"
    )
    yield f"whole step: dense layers | {r.training_time(OURS, '20 dense')} (0.2:"
    yield (
        "whole step, Nesterov: ResNet-18; transformer of 1.8 M | "
        f"{r.training_time(NESTEROV, 'ResNet-18')}; "
        f"{r.training_time(NESTEROV, large)} |"
    )
    yield f"Nesterov: dense layers | {r.training_time(NESTEROV, '20 dense')} (0.2:"
    column = "compile time / inner"
    yield (
        f"| {r.training_range(OURS, column)}; "
        f"Nesterov {r.training_range(NESTEROV, column)} | 1.5 |"
    )
    held = r.rows("memory")
    equal = sum(float(row["held"]) == row["theory"] for row in held)
    ours, adam = (r.row("scaling", form=f, leaves="200") for f in (OURS, ALONE))
    compiling, tracing = (
        float(ours[f"{what}, ms a leaf"]) / float(adam[f"{what}, ms a leaf"])
        for what in ("compile", "trace")
    )
    yield f"Adam's, 200 leaves | {compiling:.2f}; tracing {tracing:.2f} | 1.8 |"
    yield f"| {equal} of {len(held)} rows equal the count by hand to the byte |"
    sweep = r.row("sweep", form="separate programs")
    yield f"separate programs / one | {sweep['time / vmap']} |"
    averaged = r.rows("replicas", form="averaged at syncs")
    (sent,) = {row["sent at sync"] for row in averaged if "sent at sync" in row}
    yield f"of data-parallel's | {sent} / k |"
    four = ", ".join(row["temporaries"] for row in averaged if row.get("v5e") == "4x4")
    yield f"TPU v5e 4x4, optimizer's part: temporaries | {four} N (0.48"
    alone = {
        row["two slices of v5e 2x4"]: float(row["temporaries"])
        for row in r.rows("replicas", form="outer_loop")
        if "in branches" in row
    }
    two = ", ".join(
        f"{float(row['temporaries']) - alone[row['two slices of v5e 2x4']]:.2f}"
        for row in averaged
        if "in branches" in row
    )
    yield f"temporaries minus `outer_loop`'s | {two} N"
    cpu = (
        row["temporaries / N"]
        for form in ("averaged at syncs", "outer_loop")
        for row in r.rows("replicas", form=form)
        if "temporaries / N" in row
    )
    yield "many workers, cpu: temporaries | {} n, `outer_loop` alone {} |".format(*cpu)
    yield (
        f"packages, Adam, SGD | {r.peers(OURS)}; "
        f"`optax.lookahead` {r.peers(UPSTREAM)}; "
        f"`pytorch_optimizer` (eager, fused) {r.peers('pytorch_optimizer', 'fused')} |"
    )


def sections_on_cost(r):
    inners = "sgd", "momentum", "adam", "adamw", "lion", "adafactor"
    for form in (
        OURS, NESTEROV, UPSTREAM, "naive where", "lax.cond", "lax.cond in the loop"
    ):  # fmt: skip
        yield cells(
            form,
            *(
                f"{r.step_time(form, i)} ({r.step_temporary(form, i, spec='.1f')})"
                for i in inners
            ),
        )
    floors = (r.step(OURS, i)["floor"] / r.step(ALONE, i)["floor"] for i in inners)
    yield cells("floor of lookahead", *(f"{floor:.2f}" for floor in floors))
    times = (r.step_time(OURS, "adam", slice_="k", size=100_000, k=k) for k in (50, 1))
    yield "With k = 50 a step takes {} times Adam's, with k = 1 {}.".format(*times)
    upstream, over = [], []
    for inner in ("adam", "sgd"):
        ours, theirs = (r.cpu_times(form, inner) for form in (OURS, UPSTREAM))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        upstream += [min(theirs), max(theirs)]
        over += [min(ratios), max(ratios)]
    yield "{:.2f} to {:.2f} times Adam's step and {:.2f} to {:.2f} times SGD's".format(
        *upstream
    )
    yield "`lookahead` takes {:.2f} to {:.2f} and {:.2f} to {:.2f} of its time".format(
        *over
    )
    for policy, inner in (
        (RESET, '`"reset"` moves inner'),
        (INTERPOLATE, "Adam inner"),
    ):
        yield f"{inner} + {r.tpu_more(policy)} N"

    for task in dict.fromkeys(
        row["task, parameters"] for row in r.rows("training_step")
    ):
        for inner in ("adamw", "momentum"):
            times = (
                median(r.training(form, task, inner))
                for form in (OURS, NESTEROV, RESET, INTERPOLATE, UPSTREAM, AGAIN)
            )
            more = (
                r.training(form, task, inner)["temporaries - inner's, N"]
                for form in (OURS, NESTEROV, RESET)
            )
            yield cells(task, inner, *times, " / ".join(more))

    for model in ("grows", "fixed"):
        for inner in ("adam", "adam, bf16", "clip, adam", "sgd", "momentum"):
            get = functools.partial(r.tpu, inner=inner, model=model)
            forms = ALONE, OURS, NESTEROV, UPSTREAM
            stored = (get(form, column="temporary") for form in (OURS, NESTEROV))
            yield cells(model, inner, *map(get, forms), "; ".join(stored))

    ms = r.gpu(ALONE, task="12 layers")["seconds"] * 1e3
    yield f"a step takes {ms:.1f} ms"
    below = (
        1 - r.gpu(f, "sgd", "bfloat16")["ratio"][1] / r.gpu_floor(OURS, "sgd",
                                                                dtype="bfloat16")
        for f in (OURS, UPSTREAM)
    )  # fmt: skip
    yield "is {:.1%} below its floor, `optax.lookahead` {:.1%} below".format(
        *below
    ).replace("%", " %")
    yield "`lax.cond` takes {} times Adam's step as a transformation and {}".format(
        *(
            r.gpu_time(f, "adam", spec=".2f")
            for f in ("lax.cond", "lax.cond in the loop")
        )
    )
    scaling = functools.partial(r.row, "scaling", leaves="200")
    pairs = (
        scaling(form=form)[f"{what}, ms a leaf"]
        for form in (OURS, ALONE)
        for what in ("trace", "compile")
    )
    yield (
        "{} ms to trace and {} ms to compile at 200 leaves, Adam's {} and {}".format(
            *pairs
        )
    )
    forms = "one vmap", "one program, run by run", "separate programs"
    yield (
        "one `vmap` took {} s, one program called run by run {} s, separate "
        "programs {} s".format(*(r.row("sweep", form=f)["seconds"] for f in forms))
    )


def stored_parameters(r):
    for row in r.rows("stored_parameters"):
        yield cells(*row.values())


def first_page(r):
    step = functools.partial(r.step_time, spec=".1f")
    yield (
        f"| {r.cpu_range(UPSTREAM, 'adam', '.1f')} times Adam's time, "
        f"{r.step_temporary(UPSTREAM, 'adam', spec='.1f')} more copies of the "
        f"parameters as temporary memory | {r.step_time(OURS, 'adam')} times"
    )
    gpu = functools.partial(r.gpu_time, spec=".2f")
    whole = r.gpu_time(OURS, "adamw", task="transformer")
    yield (
        f"{gpu(OURS, 'adam')} times the time of Adam's step, and {whole} times a "
        "training step of a transformer with 100 M parameters"
    )
    yield (
        f"{r.step_time(OURS, 'adam')} times Adam's step and {step(OURS, 'sgd')} times "
        f"SGD's, where `optax.lookahead` takes {r.cpu_range(UPSTREAM, 'adam', '.1f')}"
        f" and {r.cpu_range(UPSTREAM, 'sgd', '.1f')}"
    )
    dense = r.dense(OURS, "time / inner (quartiles)")
    yield (
        f"{r.training_range(OURS)} times with ResNet-18 and transformers, where "
        "measuring the inner optimizer twice differs by up to "
        f"{r.again(REAL_MODELS)}, and "
        f"{min(dense):.1f} to {max(dense):.1f} times in a network of only dense layers"
    )
    resnet, transformer, dense = (
        max(
            float(row["temporaries - inner's, N"])
            for row in r.rows("training_step", form=OURS)
            if row["task, parameters"].startswith(task)
        )
        for task in ("ResNet", "transformer", "20 dense")
    )
    none = {0.0: "none"}.get(resnet, f"{resnet:.1f} of a copy")
    yield (
        f"on a CPU {none} with ResNet-18, up to {transformer:.1f} of a copy with "
        f"transformers and {dense:.1f} in a network of only dense layers"
    )
    yield (
        f"{gpu(NESTEROV, 'adam')} times Adam's step on a GPU and "
        f"{step(NESTEROV, 'adam')} times on a CPU, where whole training steps of "
        f"ResNet-18 and transformers take {r.training_range(NESTEROV)} times"
    )


def host_memory(r):
    for row in r.rows("slow_memory", layers=10):
        slice_, _, form, arguments, _, temporaries, loop, every, moved = row.values()
        yield cells(
            slice_,
            form,
            f"{arguments:.2f}",
            f"{temporaries:.2f}",
            str(loop),
            str(every),
            f"{moved:.2f}",
        )
    more = (
        "{:.1f}".format(
            r.row("slow_memory", form="lookahead on the host", **where)[column]
            - r.row("slow_memory", form="Adam", **where)[column]
        )
        for column in ["temporaries, N"]
        for where in ({"slice": "16x16", "layers": n} for n in (2, 4, 6, 8, 10, 12))
    )
    yield (
        "2, 4, 6, 8, 10 and 12 layers the option adds {}, {}, {}, {}, {} and {} N"
    ).format(*more)


def many_workers(r):
    for row in r.rows("replicas"):
        if "collectives" in row:
            columns = [value for name, value in row.items() if name != "collectives"]
            yield cells(*columns)
        elif "in branches" in row:
            yield cells(*row.values())


def found(r):
    yield f"an optimizer step takes {r.step_time(OURS, 'adam')} times Adam's"
    yield f"ResNet-18 training step {r.training_time(OURS, 'ResNet')}".replace(
        ", ", " and "
    )
    best, fixed, alone, coin = adaptive_alpha(r)
    yield f"Best test accuracy {best[:4]} %, fixed {fixed}, Adam alone {alone}."
    yield f"a random choice of the two bounds gave {coin[:4]} |"


def adaptive_alpha(r):
    """Returns the best test accuracies: chosen, fixed, Adam alone, and by a coin."""
    return [
        max(
            row["test %"]
            for row in r.rows("adaptive_alpha")
            if row["form"].startswith(start)
        )
        for start in ("A = ", "alpha = ", "alone", "alpha by coin")
    ]


def examples(r):
    best, fixed, _, _ = adaptive_alpha(r)
    yield (
        f"the best test accuracy is {best[:4]} % with an adaptive alpha and "
        f"{fixed} % with a fixed one"
    )
    at_bounds = [
        sum(int(row[name].split()[0]) for name in ("at 0.2", "at 1"))
        for row in r.rows("adaptive_alpha", form="A = nu")
    ]
    yield f"bounds in {min(at_bounds)} to {max(at_bounds)} % of the syncs"


def design(r):
    (stored,) = {
        r.step_temporary("lax.cond", inner, spec=".1f") for inner in ("sgd", "adam")
    }
    time = r.gpu_time("lax.cond", "adam", spec=".2f")
    yield (
        f"{stored} more copies of the parameters on a CPU, and {time} times the time "
        "of Adam's step"
    )


def upgrading(r):
    dense = r.dense(OURS, "time / inner (quartiles)")
    yield (
        f"dense layers on a CPU** take {min(dense):.1f} to {max(dense):.1f} times the "
        "inner"
    )
    yield f"alone takes {r.step_time(NESTEROV, 'adam', spec='.1f')} times Adam's"


def migrating(r):
    more = (r.step_temporary(f, "adam", spec=".1f") for f in (UPSTREAM, OURS))
    theirs, ours = more
    none = {"0.0": "none more"}.get(ours, f"{ours} copies more")
    yield f"{theirs} copies of the parameters more than Adam's | {none} than Adam's |"


PAGES = {
    "README.md": [first_page],
    "docs/design.md": [design],
    "docs/host_memory.md": [host_memory],
    "docs/many_workers_cost.md": [many_workers],
    "docs/migrating.md": [migrating],
    "docs/upgrading.md": [upgrading],
    "docs/what_we_found.md": [found],
    "examples/README.md": [examples],
    "benchmarks/README.md": [cost_for_users, cost_for_contributors, sections_on_cost],
    "docs/optimizers_that_store_parameters.md": [stored_parameters],
}
CASES = [(page, claims) for page, each in PAGES.items() for claims in each]


def plain(text):
    """Returns a text without the breaks of lines, and with all letters small."""
    return " ".join(text.split()).lower()


def missing(page_text, claims, results):
    page = plain(page_text)
    return [text for text in claims(Results(results)) if plain(text) not in page]


@pytest.mark.parametrize(("page", "claims"), CASES)
def test_the_page_says_what_the_files_say(page, claims):
    text = (ROOT / page).read_text()
    assert not missing(text, claims, files()), "the page should say these"


# What a row is found by, and the unit of some columns.
KEPT = {
    "batch", "case", "dtype", "form", "framework", "inner", "k", "layers", "leaves",
    "model", "n",
    "parameters", "size", "slice", "task", "task, parameters", "v5e", "variant",
}  # fmt: skip


def changed(value, scale=1):
    """Returns results in which every figure is another one, in each form."""
    if isinstance(value, dict):
        scale = len(value.get("form", "")) + 2
        return {k: v if k in KEPT else changed(v, scale) for k, v in value.items()}
    if isinstance(value, list):
        return [changed(each, scale) for each in value]
    if isinstance(value, str):
        return re.sub(r"\d", lambda digit: str(9 - int(digit[0])), value)
    return scale * (value + 10**9)


@pytest.mark.parametrize(("page", "claims"), CASES)
def test_every_claim_of_a_page_is_missed_when_the_files_change(page, claims):
    text, other = (ROOT / page).read_text(), changed(files())
    assert missing(text, claims, other) == list(claims(Results(other)))


@pytest.mark.parametrize(("page", "claims"), CASES)
def test_a_figure_that_is_altered_on_the_page_or_gone_is_missed(page, claims):
    text = plain((ROOT / page).read_text())
    for claim in map(plain, claims(Results(files()))):
        altered = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), claim)
        assert missing(text.replace(claim, altered), claims, files())
        assert missing(text.replace(claim, ""), claims, files())
