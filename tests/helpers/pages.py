"""The blocks of Python on the pages, found by the label above each.

A block is labelled by a comment on the line above its fence, which no reader sees:

    <!-- test: NAME -->
    ```python

A block can move, also to another page, without a change here. A block that no test asks
for by its name is run by itself in `library/test_pages.py`, so it needs nothing but its
label. A block that continues another one, or whose output is checked, has a test that
calls `run_block`.
"""

import functools
import pathlib
import re
import textwrap
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
TESTED = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Their links are checked, too.
PAGES = sorted({*TESTED, *ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md")})

LABEL = r"<!-- *test: *(?P<label>[^ ]+) *-->"
FENCE = r"(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<source>.*?)^ *```[ ]*$"
LABELLED = re.compile(rf"(?:^ *{LABEL} *\n)?^{FENCE}", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of Python, and where it is."""

    page: str
    line: int
    label: str | None
    source: str


def python_blocks(text, page):
    """Returns the blocks of Python on a page, with a label or without one."""
    return [
        Block(
            page,
            text.count("\n", 0, match.start("source")) + 1,
            match["label"],
            textwrap.dedent(match["source"]),
        )
        for match in LABELLED.finditer(text)
        if match["language"].split()[:1] in (["python"], ["py"])
    ]


@functools.cache
def all_blocks():
    return [
        block
        for path in TESTED
        for block in python_blocks(path.read_text(), str(path.relative_to(ROOT)))
    ]


@functools.cache
def labelled_blocks():
    return {block.label: block for block in all_blocks() if block.label}


def run_block(label, namespace=None):
    """Runs the block with this label, and returns its names.

    A namespace that is given holds the names of earlier blocks.
    """
    block = labelled_blocks()[label]
    namespace = {} if namespace is None else namespace
    # So that a traceback shows the line of the page.
    source = "\n" * (block.line - 1) + block.source
    exec(compile(source, ROOT / block.page, "exec"), namespace)
    return namespace
