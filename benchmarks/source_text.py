"""Text to train on without a download: the source code of installed packages.

It takes the `*.py` files of the standard library and of the distributions whose
metadata names a permissive licence and no other. Third-party code in a package, in
`_vendor` and similar folders, may have another licence and is left out. So are long
files, which are mostly tables, and files that are equal to an earlier one.
"""

import hashlib
import importlib.metadata
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|HPND|CC0)\b"
)
OTHER = re.compile(r"GPL|MPL|Mozilla|EPL|Eclipse|CeCILL|Proprietary|NVIDIA|LicenseRef")
VENDORED = {"_vendor", "_vendored", "vendor", "vendored", "extern", "externals"}
LONGEST = 300_000  # bytes of a file
HELD_OUT = 20  # a twentieth


class Text(NamedTuple):
    """Bytes of source code, split by package."""

    train: np.ndarray  # uint8
    held_out: np.ndarray  # uint8
    train_packages: list[str]
    held_out_packages: list[str]
    sha256: str  # of both, in this order

    def __str__(self):
        return (
            f"{len(self.train):,} bytes of {len(self.train_packages)} packages to "
            f"train on, {len(self.held_out):,} of {len(self.held_out_packages)} others "
            f"held out,\nsha256 {self.sha256}"
        )


def is_permissive(metadata: importlib.metadata.PackageMetadata) -> bool:
    """Whether the metadata name a permissive licence and no other."""
    # Older metadata have the whole licence in one field.
    field = next(iter(metadata.get_all("License", [""])[0].splitlines()), "")
    said = [field, *metadata.get_all("License-Expression", [])]
    for classifier in metadata.get_all("Classifier", []):
        if classifier.startswith("License"):
            said.append(classifier)
    words = "; ".join(said)
    return bool(PERMISSIVE.search(words)) and not OTHER.search(words)


def installed() -> Iterator[tuple[str, list[pathlib.Path]]]:
    """Returns the packages that may be used, by name, with their files."""
    found: dict[str, list[pathlib.Path]] = {}
    for distribution in importlib.metadata.distributions():
        # The first of a name is the one that is imported.
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name and name not in found and is_permissive(distribution.metadata):
            files = distribution.files or []
            found[name] = [pathlib.Path(str(file.locate())) for file in files]
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    found["python"] = [
        path
        for path in library.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.parts)
    ]
    yield from sorted(found.items())


def read(
    packages: Iterable[tuple[str, list[pathlib.Path]]], most: int
) -> dict[str, bytes]:
    """Returns the text of each package, until these have `most` bytes together."""
    texts, seen, size = {}, set(), 0
    for name, paths in packages:
        parts = []
        for path in sorted(paths):
            if path.suffix != ".py" or VENDORED & set(path.parts):
                continue
            # A distribution may list files that do not exist.
            content = path.read_bytes() if path.is_file() else b""
            digest = hashlib.sha256(content).digest()
            if 0 < len(content) <= LONGEST and digest not in seen:
                seen.add(digest)
                parts.append(content)
        if parts:
            texts[name] = b"\n".join(parts)
            size += len(texts[name])
        if size >= most:
            break
    return texts


def split(texts: dict[str, bytes]) -> Text:
    """Holds the smallest packages out, until they are a twentieth of the bytes.

    No package is in both parts, and none is most of the part that is held out.
    """
    if len(texts) < 2:
        raise ValueError(f"two packages or more are needed, got {list(texts)}.")
    total = sum(map(len, texts.values()))
    held_out, size = [], 0
    for name in sorted(texts, key=lambda name: (len(texts[name]), name))[:-1]:
        if size * HELD_OUT >= total:
            break
        held_out.append(name)
        size += len(texts[name])
    train = sorted(texts.keys() - held_out)
    parts = [
        b"\n".join(texts[name] for name in names) for names in (train, sorted(held_out))
    ]
    return Text(
        np.frombuffer(parts[0], np.uint8),
        np.frombuffer(parts[1], np.uint8),
        train,
        sorted(held_out),
        hashlib.sha256(parts[0] + b"\0" + parts[1]).hexdigest(),
    )


def source_text(most: int) -> Text:
    return split(read(installed(), most))
