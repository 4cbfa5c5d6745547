"""What the examples share: the option parser, its checks, `describe` and colours."""

import argparse
import pathlib
from typing import NoReturn

# Safe for colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        # Without argparse's usage message before it.
        self.exit(2, f"{self.prog}: error: {message}\n")

    def check_counts(self, args: argparse.Namespace, *names: str) -> None:
        for name in names:
            if getattr(args, name) < 1:
                self.error(f"--{name} must be at least 1, got {getattr(args, name)}.")

    def check_picture(self, path: pathlib.Path) -> None:
        if path.suffix != ".png" or not path.parent.is_dir():
            self.error(f"--out must be a .png in an existing folder, got {path}.")


def describe(setting: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in setting.items())
