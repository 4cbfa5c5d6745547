"""How the tests run a script as its command, and what a refusal looks like."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"


def run(script, *arguments, **environment):
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = os.environ | environment
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )


def check_one_line_of_error(result, message):
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
