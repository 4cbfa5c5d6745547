"""Is there a place for every test, and does the page about them name it?"""

import ast
import re

import pytest
from commands import ROOT

TESTS = ROOT / "tests"
PAGE = (TESTS / "README.md").read_text()
FILES = {path.stem: path for path in sorted(TESTS.glob("**/test_*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_in_the_index_of_its_folder_with_its_opening_question(name):
    path = FILES[name]
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    question = docstring.split("\n\n")[0].replace("\n", " ")
    assert question.endswith("?")
    head = f"| {path.parent.name} | question |\n|---|---|\n"
    index = PAGE.partition(head)[2].partition("\n\n")[0]
    row = f"| `{name}` | {question} |"
    assert row in index.splitlines(), "write this row into tests/README.md"


def test_the_index_names_no_file_that_is_gone():
    assert set(re.findall(r"^\| `(test_\w+)`", PAGE, re.M)) == set(FILES)
    assert {path.parent.name for path in FILES.values()} == {"library", "scripts"}


@pytest.mark.parametrize("name", FILES)
def test_no_test_file_imports_another(name):
    imported = re.findall(r"^ *(?:from|import) +(\w+)", FILES[name].read_text(), re.M)
    assert not FILES.keys() & set(imported)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_looks_at_compiled_programs_compiles_them_as_shipped(name):
    text = FILES[name].read_text()
    if re.search(r"\.(memory_analysis|cost_analysis)\(|compile\(\)\.as_text\(", text):
        assert "as_shipped(" in text
