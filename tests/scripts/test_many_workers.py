"""Does the example with many workers count what they send, and print what it claims?"""

import re

import delayed
import delayed_workers
import many_workers
import pytest
from helpers.commands import EXAMPLES, check_refused, run
from messages import Messages, crosses, messages

SCRIPT = EXAMPLES / "many_workers.py"


@pytest.mark.slow
def test_it_prints_a_row_per_method_with_its_bytes_and_draws_a_picture(tmp_path):
    picture = tmp_path / "workers.png"
    tiny = ("--seeds", 1, "--width", 8, "--depth", 1, "--context", 8, "--batch", 2)
    settings = ("--steps", 40, "--rates", 0.03, "--out", picture)
    result = run(SCRIPT, *tiny, *settings)
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^([\w, =-]+?) +(\d\.\d{3}) ± 0\.000 \* +([\d,]+)$", result.stdout, re.M
    )
    assert [name for name, *_ in rows] == list(many_workers.METHODS)
    assert len({loss for _, loss, _ in rows}) == 5, "the methods differ"
    sent = [int(number.replace(",", "")) for *_, number in rows]
    # The same, and a number for the healthy replicas, once a cycle.
    expected = [(sent[0] + 4) / k for k in (5, 20, 5, 20)]
    assert sent[1:] == pytest.approx(expected, abs=1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "200/200" in result.stderr, "the progress bar counts every update"


@pytest.mark.slow
def test_it_also_runs_with_muon_inside(tmp_path):
    tiny = ("--seeds", 1, "--width", 8, "--depth", 1, "--context", 8, "--batch", 2)
    settings = ("--steps", 40, "--rates", 0.03, "--out", tmp_path / "workers.png")
    result = run(SCRIPT, *tiny, *settings, "--inner", "muon")
    assert result.returncode == 0, result.stderr
    assert "inner optimizer: muon." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "100"], "--steps must be a positive multiple of 40, got 100."),
        (["--batch", "3"], "--batch must be a multiple of 2, got 3."),
        (["--inner", "sgd"], "argument --inner: invalid choice: 'sgd'"),
    ],
)
def test_a_bad_option_is_answered_with_one_line(arguments, message):
    check_refused(many_workers.main, arguments, message)


@pytest.mark.parametrize(
    ("groups", "across"),
    [
        ("replica_groups={}", True),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", False),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", True),
        ("replica_groups=[4,2]<=[8]", False),
        ("replica_groups=[2,4]<=[8]", True),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", True),
        ("replica_groups=[4,2]<=[2,4]T(0,1)", False),
        ("replica_groups=mesh['x'=4,'y'=2] {'x'}", True),
        ("replica_groups=mesh['x'=4,'y'=2] {'y'}", False),
        ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", True),
        ("source_target_pairs={{0,1},{1,0}}", False),
        ("source_target_pairs={{0,2},{2,0}}", True),
    ],
)
def test_groups_of_devices_are_read_in_every_form_that_xla_writes(groups, across):
    line = f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {groups}, to_apply=%add"
    assert crosses(line, 8, lambda device: device // 2) == across


def test_a_form_that_it_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="no groups of devices were read"):
        crosses("replica_groups=@something", 8, lambda device: device)


def test_what_stands_in_a_branch_is_told_from_what_every_step_sends():
    text = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%stay (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%inner (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%q), replica_groups={{0,2},{1,3}}, to_apply=%add
}

%sync (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %s = f32[8]{0} call(%p.1), to_apply=%inner
}

ENTRY %main (x: f32[8], flag: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %flag = pred[] parameter(1)
  %small = bf16[2]{0} parameter(2)
  %within = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %all = bf16[2]{0} all-reduce(%small), replica_groups={}, to_apply=%add
  ROOT %y = f32[8]{0} conditional(%flag, %x, %x), branch_computations={%stay, %sync}
}
"""
    found = messages(text, 4, lambda device: device // 2)
    assert found == Messages(always=4, in_branch=32)


SENDS = """HloModule cycle, is_scheduled=true

%step (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %p = (s32[], f32[8]{0}) parameter(0)
}

%more.4 (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %n = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%more.6 (p.2: (s32[], f32[8])) -> pred[] {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%p.2), index=0
  %m = s32[]{:T(128)} constant(6)
  ROOT %less.1 = pred[] compare(%j, %m), direction=LT
}

ENTRY %main (x: (s32[], f32[8]), y: f32[8]) -> f32[8] {
  %x = (s32[], f32[8]{0}) parameter(0)
  %y = f32[8]{0} parameter(1)
  %before = (s32[], f32[8]{0}) while(%x), condition=%more.6, body=%step
  %after-all = token[] after-all()
  %send = (f32[8]{0}, u32[], token[]) send(%y, %after-all), channel_id=1
  %recv = (f32[8]{0}, u32[], token[]) recv(%after-all), channel_id=2
  %early = token[] send-done(%send), channel_id=1
  %during = (s32[], f32[8]{0}) while(%before), condition=%more.4, body=%step
  %late = (f32[8]{0}, u32[], token[]) send(%y, %after-all), channel_id=3
  %send-done = token[] send-done(%late), channel_id=3
  %recv-done = (f32[8]{0}, token[]) recv-done(%recv), channel_id=2
  ROOT %z = f32[8]{0} get-tuple-element(%recv-done), index=0
}
"""


def test_what_is_sent_is_counted_by_the_side_of_the_loop_on_which_it_stands():
    def around(trips):
        found = delayed.around_loop(SENDS, trips)
        assert found["starts"] == found["completions"] == 3
        assert (found["bytes"], found["loops"]) == (2 * 32, 2)
        return found["started before the loop"], found["completed after it"]

    assert around(4) == (2, 2)
    assert around(6) == (0, 3)
    assert around(5) == (0, 0)
    with pytest.raises(ValueError, match="not in the order of its schedule"):
        delayed.around_loop(SENDS.replace("is_scheduled", "was_scheduled"), 4)


@pytest.mark.slow
def test_the_example_with_delays_prints_a_row_per_delay_and_mix():
    tiny = ("--seeds", 1, "--width", 8, "--depth", 1, "--context", 8, "--batch", 2)
    result = run(EXAMPLES / "delayed_workers.py", *tiny, "--steps", 40)
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^(\w+) +delay +(\d+), mix (\S+) +(\d\.\d{3}) ± 0\.000 +(\S+) ±",
        result.stdout,
        re.M,
    )
    assert len(rows) == 2 * len(delayed_workers.DELAYS)
    for name, delay, _, _, difference in rows:
        assert name in delayed_workers.OUTERS
        assert (difference == "+0.0000") == (delay == "0")
    assert "400/400" in result.stderr, "the progress bar counts every update"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "100"], "--steps must be a positive multiple of 40, got 100."),
        (["--rate", "0"], "--rate must be positive and finite, got 0."),
        (["--width", "9"], "--width must be a multiple of 4 heads, got 9."),
    ],
)
def test_a_bad_option_of_it_is_answered_with_one_line(arguments, message):
    check_refused(delayed_workers.main, arguments, message)
