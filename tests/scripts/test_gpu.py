"""Does the benchmark for GPUs keep its results when something fails?

`.ci/run` runs all of it at a small size.
"""

import json

import gpu
import pytest
from forms import FORMS, OURS, UPSTREAM
from helpers.commands import check_refused, run_here
from timing import kernels

# As XLA writes it: a fusion and a branch of which one side copies, and the other does
# nothing, are two kernels, and an asynchronous copy is one.
PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%same (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}

%copies (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %copy = f32[8]{0} copy(%b)
}

%fused (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %add = f32[8]{0} add(%c, %c)
}

ENTRY %main (p: f32[8], flag: pred[]) -> (f32[8], /*index=1*/f32[8]) {
  %p = f32[8]{0} parameter(0)
  %flag = pred[] parameter(1)
  %fusion = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="copies"}
  %start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%fusion)
  %done = f32[8]{0} copy-done(%start)
  %cond = f32[8]{0} conditional(%flag, %p, %p), branch_computations={%same, %copies}
  ROOT %tuple = (f32[8]{0}, /*index=1*/f32[8]{0}) tuple(%cond, %done)
}
"""


def rows_of(path):
    rows = json.loads(path.read_text())["rows"]
    return {(row["task"], row["form"]): row for row in rows}


def test_kernels_are_counted_as_by_hand():
    assert kernels(PROGRAM) == 3


@pytest.mark.slow
def test_after_the_time_limit_every_row_says_so(tmp_path):
    path = tmp_path / "gpu.json"
    result = run_here(gpu.main, "--quick", "--budget", 0, "--json", path)
    assert result.returncode == 0, result.stderr
    assert all("error" in row for row in rows_of(path).values())
    assert result.stdout.count("**not measured**") == 8


@pytest.mark.slow
def test_a_form_that_fails_is_a_row_beside_the_others(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nin detail")

    monkeypatch.setitem(FORMS, UPSTREAM, fail)
    path = tmp_path / "gpu.json"
    result = run_here(gpu.main, "--quick", "--tasks", gpu.STEP, "--json", path)
    assert result.returncode == 0, result.stderr
    rows = rows_of(path)
    failed = rows[gpu.STEP, UPSTREAM]
    assert failed["error"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert "seconds" not in failed
    assert rows[gpu.STEP, OURS].keys() >= {"seconds", "ratio", "peak", "kernels"}
    again = run_here(gpu.main, "--from-json", path)
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert "RESOURCE_EXHAUSTED" in again.stdout


def test_a_mistake_is_answered_with_one_line():
    check_refused(gpu.main, ["--tasks", "all"], "invalid choice: 'all'")
