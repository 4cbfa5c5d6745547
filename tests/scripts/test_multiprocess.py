"""Does the example with several processes agree with one, and leave none running?"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import multiprocess
import numpy as np
import pytest
from helpers.commands import EXAMPLES, check_refused

ENDLESS = ("--steps", 10**6)
PATIENCE = 120  # seconds, for a loaded machine


class Run:
    """The script in its own process; on leaving, it is no longer running."""

    def __init__(self, *arguments):
        command = [sys.executable, EXAMPLES / "multiprocess.py", *arguments]
        self.process = subprocess.Popen(
            [str(x) for x in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def read_pids(self):
        # It names its processes in the first two lines, as soon as they have started.
        self.head = self.process.stdout.readline() + self.process.stdout.readline()
        pids = re.findall(r"([a-z]+(?:-\d+)?) \(pid (\d+)\)", self.head)
        return {name: int(pid) for name, pid in pids}

    def end(self):
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


def is_running(pid):
    try:
        os.kill(pid, 0)
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # ended, but not yet collected


def wait_until(condition, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def read_weights(path):
    with np.load(path) as weights:
        return dict(weights)


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    folder = tmp_path / "run"
    with Run("--steps", 13, "--folder", folder) as run:
        pids = run.read_pids()
        code, out, err = run.end()
    assert code == 0, err
    assert list(pids) == ["process-0", "process-1", "alone"]
    assert not any(map(is_running, pids.values()))
    several, alone = map(read_weights, (folder / "process-0.npz", folder / "alone.npz"))
    assert several.keys() == alone.keys()
    assert len(several) == 2 * 6
    for name, value in several.items():
        np.testing.assert_allclose(value, alone[name], rtol=0, atol=1e-9)
        other = name.replace("fast", "slow")
        assert other == name or np.any(value != several[other]), "ends in mid-cycle"
    size, share = map(
        float, re.search(r"state: ([\d.]+) kB, .* holds ([\d.]+)", out).groups()
    )
    assert size / 8 < share < 1.05 * size / 8, "all but a few small leaves are sharded"
    assert "checkpoint: after update 6, with 1 of 5 updates of its cycle done" in out
    assert {path.name for path in folder.glob("checkpoint/ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    figures = r" +(\d\.\d+) +(\d+\.\d) %"
    rows = [
        re.search(rf"^{label}{figures}", out, re.M).groups()
        for label in ("2 processes, 8 devices", "1 process, 1 device")
    ]
    assert rows[0] == rows[1]
    largest = re.search(r"difference: (\S+) in the .*, (\S+) in the slow", out)
    assert all(float(x) <= 1e-9 for x in largest.groups())


@pytest.mark.slow
def test_a_killed_run_of_replicas_resumes_in_mid_cycle_and_ends_with_the_weights_of_one(
    tmp_path,
):
    folder = tmp_path / "run"
    settings = ("--replicas", "--steps", 43, "--folder", folder)
    with Run(*settings) as run:
        pids = run.read_pids()
        progress = folder / "process-1.progress"
        # The checkpoint is that of update 21.
        wait_until(lambda: progress.exists() and progress.stat().st_size >= 23)
        os.kill(pids["process-1"], signal.SIGKILL)
        code, out, err = run.end()
    assert code == 1
    assert re.search(r"process-1 \(pid \d+\) died after \d+ updates", err)
    assert not (folder / "process-0.npz").exists()
    with Run(*settings, "--resume") as run:
        run.read_pids()
        code, out, err = run.end()
    assert code == 0, err
    assert "checkpoint: after update 21, with 1 of 5 updates of its cycle done" in out
    several, alone = map(read_weights, (folder / "process-0.npz", folder / "alone.npz"))
    for name, value in several.items():
        assert len(value) == 2, "a row for each replica"
        np.testing.assert_allclose(value, alone[name], rtol=0, atol=1e-9)
        if name.startswith("fast"):
            assert np.any(value[0] != value[1]), "ends in mid-cycle, apart"
        else:
            np.testing.assert_allclose(value[0], value[1], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_an_error_that_names_it(tmp_path):
    folder = tmp_path / "run"
    with Run(*ENDLESS, "--folder", folder) as run:
        pids = run.read_pids()
        progress = folder / "process-1.progress"
        wait_until(lambda: progress.exists() and progress.stat().st_size >= 3)
        killed = time.monotonic()
        os.kill(pids["process-1"], signal.SIGKILL)
        code, out, err = run.end()
        seconds = time.monotonic() - killed
    assert code == 1
    assert out == ""
    message = (
        rf"error: process-1 \(pid {pids['process-1']}\) died after \d+ updates "
        r"\(exit code -9, SIGKILL\), so all were stopped\. "
        r"The end of what it wrote:\n    "
    )
    assert re.search(message, err)
    assert seconds < 20
    assert not any(map(is_running, pids.values()))


@pytest.mark.slow
def test_a_process_that_fails_shows_why_while_the_other_waits_for_it(tmp_path):
    folder = tmp_path / "run"
    with Run(*ENDLESS, "--folder", folder) as run:
        pids = run.read_pids()
        (folder / "process-1.progress").mkdir()  # where it will write
        code, _, err = run.end()
    assert code == 1
    assert re.search(r"error: process-1 \(pid \d+\) died .* \(exit code 1\)", err)
    assert "IsADirectoryError: " in err
    assert not any(map(is_running, pids.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_script(name):
    with Run(*ENDLESS) as run:
        pids = run.read_pids()
        assert all(map(is_running, pids.values()))
        signum = getattr(signal, name)
        run.process.send_signal(signum)
        run.process.wait(PATIENCE)
        wait_until(lambda: not any(map(is_running, pids.values())))
        code, _, err = run.end()
    if name == "SIGKILL":
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + signum
        assert f"stopped by {name}\n" in err


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_stopped():
    with Run(*ENDLESS, "--timeout", 0.5) as run:
        pids = run.read_pids()
        code, _, err = run.end()
    assert code == 1
    assert "error: over the --timeout of 0.5 s: process-0 after 0 updates, " in err
    assert not any(map(is_running, pids.values()))


@pytest.mark.parametrize("change", [1e-6, np.nan])
@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_weights_that_differ_are_an_error(kind, change, tmp_path, capsys):
    weights = {"fast/w": np.ones(3), "slow/w": np.ones(3)}
    figures = {"steps_since_sync": 1, "bytes": 8, "bytes_on_a_device": 1, "loss": 1}
    for name in ("alone", "process-0"):
        np.savez(tmp_path / f"{name}.npz", **weights)
        (tmp_path / f"{name}.json").write_text(json.dumps({**figures, "accuracy": 1}))
    args = argparse.Namespace(processes=2, steps=13)
    multiprocess.report(args, tmp_path)
    weights[f"{kind}/w"][1] += change
    np.savez(tmp_path / "process-0.npz", **weights)
    with pytest.raises(SystemExit, match="error: the weights differ by more than the"):
        multiprocess.report(args, tmp_path)
    where = "parameters" if kind == "fast" else "slow weights"
    assert f"{change:.1e} in the {where}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", 0], "--processes must be at least 1, got 0."),
        (["--folder", EXAMPLES], "--folder must be a new folder in an existing one"),
        (["--resume"], "--resume needs a --folder with a checkpoint, got none."),
        (["--workers", 2], "unrecognized arguments: --workers 2"),
    ],
)
def test_a_bad_option_is_answered_with_one_line(arguments, message):
    check_refused(multiprocess.main, arguments, message)
