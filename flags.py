"""Command lines: a parser whose errors are one line, and types of values."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

LARGEST = 2**63 - 1  # what the libraries' counters hold


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message on stderr and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's, but a value after a flag that takes none is called that."""
        words = list(sys.argv[1:] if args is None else args)
        takes_words = any(not action.option_strings and action.help != argparse.SUPPRESS for action in self._actions)
        for word, after in itertools.pairwise([*words, "--"]):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            flag = self._option_string_actions.get(name)
            if flag is None or flag.nargs != 0 or flag.dest == "help":
                continue
            if not equals and not takes_words and not after.startswith("-"):
                equals, value = " ", after
            if equals:
                on, *off = flag.option_strings
                self.error(f"{name}{equals}{value}: the flag takes no value; write {on}, or {off[0] if off else 'not'}")
        return super().parse_known_args(words, namespace)


def number(kind: type, low: float, high: float = LARGEST, exclusive: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`, without `low` itself where `exclusive`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (exclusive and value == low) or value in (math.inf, -math.inf):
            bounds = [f"{'above' if exclusive else 'at least'} {low}"] if low > -math.inf else []
            bounds += [f"at most {high}"] if high < LARGEST or value > high else []
            shown = text if len(text) < 30 else f"{text[:30]}..."
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'a finite number'}, got {shown}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def user_path(text: str) -> str:
    """An argparse type: a path, `~` expanded as a shell does where it stands alone."""
    expanded = os.path.expanduser(text)  # noqa: PTH111  # which leaves `./log` as it is
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"no such user: {text.partition('/')[0]} (a folder of that name is ./{text})")
    return expanded
