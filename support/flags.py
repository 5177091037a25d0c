"""Command lines: a parser whose errors are one line, and flags that are declared once."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Literal, NoReturn

LARGEST = {int: 2**63 - 1, float: sys.float_info.max}  # what the libraries' counters hold; the largest finite number
# --resume: "fixed" and "free" flags keep their old value unless given; a new value is refused for "fixed".
# "machine" and "command" flags take their default unless given.
Resume = Literal["fixed", "free", "machine", "command"]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line. Help texts show defaults."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)
        self.resume: dict[str, Resume] = {}  # by name of the flag

    def complain(self, message: str) -> None:
        """Prints an error in one line on stderr, if anybody can read it. Control characters are escaped."""
        message = re.sub(r"\s*\n\s*(?=\S)", " ", message)  # libraries' messages have several lines
        shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
        shown += r" (\r is a carriage return, which lines of Windows files end in)" if "\r" in message else ""
        self._print_message(f"{self.prog}: error: {shown}\n", sys.stderr)

    def fail(self, message: str) -> NoReturn:
        """Complains and exits with status 1."""
        self.complain(message)
        sys.exit(1)

    def error(self, message: str) -> NoReturn:
        """Complains and exits with status 2: the user can put it right."""
        self.complain(message)
        sys.exit(2)

    def section(self, title: str) -> Callable[..., None]:
        """Begins a section of the help text. Returns `add(name, kind, default, help, resume="fixed")`.

        `kind` is a type, perhaps with a range as in sac_ae.py, `type | None`, a Literal, or a function of a text.
        """
        group = self.add_argument_group(title)

        def add(name: str, kind: Any, default: Any, text: str, resume: Resume = "fixed") -> None:
            group.add_argument(f"--{name}", default=default, help=text, **options(kind))
            self.resume[name] = resume

        return add

    def allows(self, name: str, value: Any) -> bool:
        """Whether a flag can have this value, which is no text but of the flag's own type."""
        flag: Any = self._option_string_actions[f"--{name}"]
        if isinstance(flag, argparse.BooleanOptionalAction):
            return isinstance(value, bool)
        try:
            return self._get_values(flag, [str(value)]) == value
        except argparse.ArgumentError:
            return False

    def given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The flags that a command line names, without the defaults of the others."""
        absent = object()  # argparse sets a default only where there is no value yet
        before = argparse.Namespace(**{action.dest: absent for action in self._actions})
        return {name: value for name, value in vars(self.parse_args(argv, before)).items() if value is not absent}


def options(kind: Any) -> dict[str, Any]:
    """argparse's options for values of a type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    (limits,) = getattr(kind, "__metadata__", [()])
    kind = getattr(kind, "__origin__", kind)
    return {"type": number(kind, *limits) if kind in LARGEST else kind}


def settings_of(agents: Iterable[type]) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and help text of every setting of some agents, by name."""
    found: dict[str, tuple[Any, Any, str]] = {}
    for settings in (agent.settings_class for agent in agents):  # type: ignore[attr-defined]
        kinds = typing.get_type_hints(settings, include_extras=True)
        for field in fields(settings):
            setting = (kinds[field.name], field.default, field.metadata.get("help", "of the agent"))
            if found.setdefault(field.name, setting)[1] != field.default:
                raise ValueError(f"agents have different defaults for {field.name}: its flag can have only one")
    return found


def number(kind: type, low: float = -math.inf, high: float = math.inf, exclusive: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`, without `low` itself if `exclusive`."""
    low, high = max(low, -LARGEST[kind]), min(high, LARGEST[kind])

    def convert(text: str) -> Any:
        value = kind(text)
        if not (value > low if exclusive else value >= low):  # nan is not either
            raise argparse.ArgumentTypeError(f"must be {'above' if exclusive else 'at least'} {low}, got {text:.30}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, got {text:.30}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is not a number
    return convert


def user_path(text: str) -> str:
    """An argparse type: a path that the system accepts; `~` is expanded, as a shell does where it stands alone."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file or a folder")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL: name a file or a folder of this machine")
    path = os.path.expanduser(text)  # noqa: PTH111  # which leaves `./log` as it is
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path):  # Cs: bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"{path} has characters that cannot be shown: choose another name")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):  # that is for the program to say
        pass
    except OSError as error:  # its name is too long, or a folder above it may not be searched
        raise argparse.ArgumentTypeError(f"{text[:100]} cannot be used: {error.strerror}") from error
    return path


def absolute_path(text: str) -> str:
    """An argparse type: as `user_path`, but absolute: it means the same wherever a program is started."""
    return os.path.abspath(user_path(text))  # noqa: PTH100  # which knows `..`, and follows no links
