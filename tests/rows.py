"""Rows of a table of parameters that are dear."""

import pytest


def dear_but(kept, rows):
    """Returns the rows as parameters of a test, with all but these few marked dear."""
    assert all(row in rows for row in kept)
    dear = pytest.mark.dear
    return [
        row
        if row in kept
        else pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=dear)
        for row in rows
    ]
