"""Is the package what its metadata says, and built on public names alone?"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import optax_lookahead

ROOT = pathlib.Path(optax_lookahead.__file__).parent


def test_the_public_names_are_these():
    public = {name for name in vars(optax_lookahead) if not name.startswith("_")}
    assert public == {
        "lookahead",
        "outer_loop",
        "slow_params",
        "set_slow_params",
        "with_inner_state",
        "LookaheadState",
        "InnerStep",
        "ema_nesterov",
        "primal_averaging",
        "ExtrapolationState",
        "average_replicas",
        "delayed_outer_loop",
        "DelayedOuterState",
        "replica_axes",
    }


def test_only_public_modules_of_jax_and_optax_are_used():
    sources = [path.read_text() for path in ROOT.glob("*.py")]
    assert len(sources) > 1
    assert not [source for source in sources if re.search(r"(jax|optax)\._src", source)]


def test_only_jax_and_optax_are_needed_at_run_time():
    needed = [
        re.split(r"[<>=!~ ]", requirement)[0]
        for requirement in importlib.metadata.requires("optax-lookahead") or []
        if "extra ==" not in requirement
    ]
    assert sorted(needed) == ["jax", "optax"]


def test_the_version_is_the_distributions():
    version = importlib.metadata.version("optax-lookahead")
    assert optax_lookahead.__version__ == version
    changelog = (ROOT.parent / "CHANGELOG.md").read_text()
    assert f"## {version}\n" in changelog
    assert f"\nversion: {version}\n" in (ROOT.parent / "CITATION.cff").read_text()


def test_type_information_is_shipped():
    assert (ROOT / "py.typed").exists()


def test_importing_it_leaves_jax_free_to_choose_its_devices():
    # As `jax.distributed.initialize` has to, which may come after the imports.
    script = (
        "import jax, optax_lookahead\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count('cpu') == 3\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pre_commit_has_the_pinned_linter():
    root = ROOT.parent
    pinned = re.search(r'"ruff==([\d.]+)"', (root / "pyproject.toml").read_text())[1]
    assert f"rev: v{pinned}\n" in (root / ".pre-commit-config.yaml").read_text()
