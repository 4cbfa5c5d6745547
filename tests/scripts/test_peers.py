"""Does the comparison report a mistake, or a missing package, in one line?

`.ci/run` runs all of it at a small size, without a peer.
"""

import peer_forms
import peers
import pytest
from helpers.commands import check_refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1."),
        (["--sizes", "500", "0"], "--sizes must be at least 1, got 0."),
        (["--tensorflow-python", "/nowhere"], "no such program: /nowhere."),
    ],
)
def test_a_mistake_is_answered_with_one_line(arguments, message):
    check_refused(peers.main, arguments, message)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModuleNotFoundError(name="absent"), "not installed: pip install absent"),
        (RuntimeError("first\nsecond"), "does not import: first"),
    ],
)
def test_a_peer_that_cannot_be_imported_is_one_line(error, line):
    assert peer_forms.explain(error, "pip install {}") == line
