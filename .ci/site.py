"""What the site makes of the pages, which are also read as they are on a code host.

A link such as `../benchmarks/README.md` leads to the repository, a picture out there is
copied into the site, and formulas become MathML, which browsers draw by themselves.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File

OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)]+)\)")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def on_files(files, config):
    """Adds the pictures that the pages show."""
    pictures = set()
    for page in files.documentation_pages():
        pictures |= {
            path for mark, _, path in OUTSIDE.findall(page.content_string) if mark
        }
    for path in sorted(pictures):
        files.append(File.generated(config, path, abs_src_path=path))
    return files


def on_page_markdown(markdown, config, **_):
    """Turns links that leave this folder into links to the repository."""

    def link(match):
        mark, text, path = match.groups()
        where = path if mark else f"{config.repo_url}/blob/main/{path}"
        return f"{mark}[{text}]({where})"

    return OUTSIDE.sub(link, markdown)


def on_page_content(page_html, **_):
    """Draws the formulas."""

    def formula(match):
        display = "block" if match["tag"] == "div" else "inline"
        return convert(html.unescape(match["tex"]), display=display)

    return FORMULA.sub(formula, page_html)
