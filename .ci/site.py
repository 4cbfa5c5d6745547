"""Makes a site of pages that are also read on a code host.

The home page is the README, and the other READMEs for users are pages, too, though they
lie outside of `docs/`. A link to a page or a picture stays on the site; one to another
file leads to the repository. Names in a line of text do not break after a hyphen or a
bracket.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    "examples/*.png",
    "benchmarks/README.md",
    "benchmarks/*.png",
)
LINK = re.compile(r"\]\((?P<path>[^()#:\s]+)")
INLINE_CODE = re.compile(r"(?<=<code>)[^<\n]+(?=</code>)")
WORD = re.compile(r"(?<!\S)\S{1,40}(?!\S)")  # a longer one is wider than a phone


def on_files(files, config):
    """Adds the pages and pictures that lie outside of `docs/`."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links between files into links on the site, or to the repository."""
    here = pathlib.Path(page.file.abs_src_path).relative_to(ROOT).parent

    def link(match):
        path = posixpath.normpath(posixpath.join(here, match["path"]))
        if not (ROOT / path).exists():
            return match[0]  # code that looks like a link, or a broken one
        on_site = path.removeprefix("docs/")
        if files.get_file_from_path(on_site):
            folder = posixpath.dirname(page.file.src_uri)
            return "](" + posixpath.relpath(on_site, folder or ".")
        return f"]({config.repo_url}/blob/main/{path}"

    return LINK.sub(link, markdown)


def on_page_content(page_html, **_):
    """Keeps each word of inline code in one piece."""

    def words(match):
        return WORD.sub(r'<span class="word">\g<0></span>', match[0])

    return INLINE_CODE.sub(words, page_html)
