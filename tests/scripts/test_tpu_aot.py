"""Does the benchmark of TPU programs count exactly the bytes that a program moves?

The figures it must give are counted by hand, from the sizes in the text.
"""

import os
import runpy

import pytest
from helpers.commands import BENCHMARKS, run

SCRIPT = BENCHMARKS / "tpu_aot.py"
# As the compiler for TPUs writes it: `p` is brought onto the chip, S(1), in two slices
# and is updated there, `m` is updated in HBM, and the new `p` is carried back.
PROGRAM = """
  %p = f32[1024]{0:T(1024)} parameter(0), metadata={op_name="p"}
  %m = f32[1024]{0:T(1024)} parameter(1)
  %count = s32[]{:T(128)} parameter(2)
  %flag = s32[]{:T(128)S(6)} copy(%count)
  %slice-start = ((f32[1024]{0:T(1024)}), f32[512]{0:T(512)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:512]}
  %slice-start.1 = ((f32[1024]{0:T(1024)}), f32[512]{0:T(512)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[512:1024]}
  %slice-done = f32[512]{0:T(512)S(1)} slice-done(%slice-start)
  %slice-done.1 = f32[512]{0:T(512)S(1)} slice-done(%slice-start.1)
  %custom-call = f32[1024]{0:T(1024)S(1)} custom-call(%slice-done, %slice-done.1), custom_call_target="ConcatBitcast"
  %fusion = (f32[1024]{0:T(1024)S(1)}, /*index=1*/f32[1024]{0:T(1024)}) fusion(%custom-call, %m, /*index=2*/%flag), kind=kLoop, calls=%f
  %gte = f32[1024]{0:T(1024)S(1)} get-tuple-element(%fusion), index=0
  %gte.1 = f32[1024]{0:T(1024)} get-tuple-element(%fusion), index=1
  %copy-start = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)S(1)}, u32[]{:S(2)}) copy-start(%gte)
  %copy-done = f32[1024]{0:T(1024)} copy-done(%copy-start)
  ROOT %tuple = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}) tuple(%copy-done, %gte.1)
"""  # noqa: E501


@pytest.fixture(scope="module")
def hbm_bytes():
    script = runpy.run_path(str(SCRIPT))
    return lambda text: script["hbm_bytes"](script["instructions"](text))


def test_staging_on_the_chip_is_not_counted(hbm_bytes):
    p = m = 4 * 1024
    assert hbm_bytes(PROGRAM) == 2 * p + 2 * m + 4  # each read and written; the count


def test_a_copy_within_hbm_is_read_and_written(hbm_bytes):
    layout = "{0:T(1024)(128)(2,1)}"
    text = f"  %p = bf16[64,16]{layout} parameter(0)\n"
    assert hbm_bytes(text) == 0
    assert hbm_bytes(f"{text}  %copy = bf16[64,16]{layout} copy(%p)") == 2 * 2 * 1024


@pytest.mark.parametrize(
    "op",
    [
        'custom-call(%p), custom_call_target="kernel"',
        "while(%p), condition=%c, body=%b",
        "all-gather-start(%p), dimensions={0}",
    ],
)
def test_what_it_cannot_count_is_an_error(hbm_bytes, op):
    text = f"  %p = f32[8]{{0}} parameter(0)\n  %x = f32[8]{{0}} {op}"
    with pytest.raises(NotImplementedError, match="cannot tell what %x, a "):
        hbm_bytes(text)


def test_a_line_it_cannot_read_is_an_error(hbm_bytes):
    with pytest.raises(ValueError, match="no instruction was read from '  %x = new"):
        hbm_bytes("  %x = new[8]{0} <syntax>")


def test_without_libtpu_the_script_says_so_in_one_line(tmp_path, monkeypatch):
    # Where there is one, it is hidden.
    (tmp_path / "libtpu.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)  # libtpu's, from `import jax`
    result = run(SCRIPT, "--quick", PYTHONPATH=path)
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "tpu-aot" in result.stderr
