"""How the tests run a script: as its command, or its `main` in their own process."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"


class Ended(NamedTuple):
    """How a script ended, with the field names of `subprocess`."""

    returncode: int | str | None
    stdout: str
    stderr: str


def run(script, *arguments, **environment):
    """Runs the script as a command, with more in its environment."""
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = os.environ | environment
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    return Ended(result.returncode, result.stdout, result.stderr)


def run_here(main, *arguments):
    """Runs a script's `main` in this process, which already has its imports."""
    argv = [f"{main.__module__}.py", *map(str, arguments)]
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return Ended(code, stdout.getvalue(), stderr.getvalue())


def check_refused(main, arguments, message):
    """Checks that a script answers these arguments with one line and status 2."""
    result = run_here(main, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
