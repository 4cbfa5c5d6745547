"""Rows of a table of parameters that are slow."""

import pytest


def slow_but(kept, rows):
    """Returns the rows as parameters of a test, with all but these few marked slow."""
    assert all(row in rows for row in kept)
    slow = pytest.mark.slow
    return [
        row
        if row in kept
        else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=slow)
        for row in rows
    ]
