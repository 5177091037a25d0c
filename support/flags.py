"""Command lines: a parser whose errors are one line, and flags that are declared once, for new and for resumed runs."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from errors import UserError
from settings import Limits
from support.machine import check_bf16, check_compiler, check_device
from support.work_dir import WorkDir

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
        """Prints an error in one line on stderr, if anybody can read it."""
        self._print_message(f"{self.prog}: error: {' '.join(message.split())}\n", sys.stderr)

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

        `kind` is a type, perhaps one of settings.py, `type | None`, a Literal of choices, or a function of a text.
        """
        group = self.add_argument_group(title)

        def add(name: str, kind: Any, default: Any, text: str, resume: Resume = "fixed") -> None:
            group.add_argument(f"--{name}", default=default, help=text, **options(kind))
            self.resume[name] = resume

        return add

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but says of a flag without a value that it takes none."""
        words = list(sys.argv[1:] if args is None else args)
        for word, after in itertools.pairwise([*words, "--"]):
            name, equals, value = word.partition("=")
            flag = self._option_string_actions.get(name)
            if isinstance(flag, argparse.BooleanOptionalAction) and (equals or not after.startswith("-")):
                choice = " or ".join(flag.option_strings)
                self.error(f"{name} takes no value, not {value if equals else after}: write {choice}")
        return super().parse_known_args(words, namespace)

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
    (limits,) = getattr(kind, "__metadata__", [Limits()])
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
    expanded = os.path.expanduser(text)  # noqa: PTH111  # which leaves `./log` as it is
    try:
        os.lstat(expanded)
    except (FileNotFoundError, NotADirectoryError):  # that is for the program to say
        pass
    except OSError as error:  # its name is too long, or a folder above it may not be searched
        raise argparse.ArgumentTypeError(f"{text[:100]} cannot be used: {error.strerror}") from error
    return expanded


def parse_run(parser: OneLineParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a run: a resumed one keeps those that are not given, except the machine's.

    Raises UserError if there is a run to resume, but its checkpoint cannot be read.
    """
    args = parser.parse_args(argv)
    checkpoint = WorkDir(Path(args.work_dir)).checkpoint
    if args.resume and checkpoint.begun():
        then = checkpoint.read()["args"].items()
        kept = {name: value for name, value in then if parser.resume.get(name) in ("fixed", "free")}
        args = parser.parse_args(argv, argparse.Namespace(**kept))
    return args


def check_run(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Refuses flags that contradict each other, the folder or the machine. Raises UserError, which says what to do."""
    if args.replay_buffer_capacity < args.batch_size:
        raise UserError(f"replay_buffer_capacity must be at least batch_size, {args.batch_size}")
    if args.resume and args.overwrite:
        raise UserError("resume and overwrite exclude each other: continue the run, or start a new one?")
    if args.save_tb and args.work_dir.encode("utf-8", "replace") != os.fsencode(args.work_dir):
        raise UserError(f"work_dir {args.work_dir} is not UTF-8, and TensorBoard cannot read it: leave save_tb out")
    check_device(args.device)
    work_dir = WorkDir(Path(args.work_dir))
    work_dir.check(args.resume, args.overwrite)
    if args.resume and work_dir.checkpoint.begun():
        check_resumed(args, parser, work_dir)
    # A checkpoint of a run in bfloat16 may continue anywhere: its precision cannot change.
    if args.precision == "bf16" and not (args.resume and work_dir.checkpoint.exists()):
        check_bf16(args.device, args.num_filters, args.hidden_dim)
    if args.compile:
        check_compiler(args.device)


def check_resumed(args: argparse.Namespace, parser: OneLineParser, work_dir: WorkDir) -> None:
    """Raises UserError if the run in the folder was started with other fixed flags, or is beyond its end."""
    # A flag that is newer than the run had its default value.
    content = work_dir.checkpoint.read()
    now, then = vars(args), vars(parser.parse_args([])) | content["args"]
    differ = [name for name, kind in parser.resume.items() if kind == "fixed" and now[name] != then[name]]
    if differ:
        changes = ", ".join(f"--{name} {then[name]} is now {now[name]}" for name in differ)
        raise UserError(f"work_dir {work_dir.path} holds a run with other flags ({changes}): choose another work_dir")
    step, limit = content["progress"]["step"] if content["progress"] else 0, args.num_train_steps
    if step > limit:
        raise UserError(f"work_dir {work_dir.path} is at step {step}, beyond --num_train_steps {limit}")


def changes(args: argparse.Namespace, parser: OneLineParser, then: dict[str, object]) -> list[str]:
    """Lines about free and machine flags whose values a resumed run changes."""
    noted = sorted(name for name, kind in parser.resume.items() if kind in ("free", "machine"))
    pairs = {name: (then.get(name), getattr(args, name)) for name in noted}
    return [f"note: --{name} was {old} and is now {new}" for name, (old, new) in pairs.items() if old != new]
