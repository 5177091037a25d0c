"""The errors that programs print as one line. Any other exception is a bug and keeps its traceback."""


class UserError(ValueError):
    """The user can put it right: a flag, a file, a folder. The message says how."""


class MachineError(RuntimeError):
    """The machine lacks something, such as disk space or a renderer, or the run has diverged."""
