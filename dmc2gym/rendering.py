"""Choice of MuJoCo's renderer: it happens through the environment, once, before dm_control is imported."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")
INSTALL_HINT = "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri libopengl0"


class RendererError(RuntimeError):
    """Nothing here can render; the message says which packages help."""


def choose_backend() -> None:
    """Sets MUJOCO_GL on Linux unless the user has: EGL, which needs no display, or OSMesa, or none.

    Elsewhere the choice stays with dm_control.
    """
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return
    for backend, library in _LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        os.environ["MUJOCO_GL"] = backend
        return
    os.environ["MUJOCO_GL"] = "disabled"


def check_display() -> None:
    """Raises RendererError for GLFW without a display, which would only fail after many lines of its own."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    if os.environ.get("MUJOCO_GL") == "glfw" and sys.platform.startswith("linux") and not any(map(os.getenv, displays)):
        raise RendererError(f"MUJOCO_GL=glfw needs a display: unset it, or {INSTALL_HINT}")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end: a renderer that is half made prints a traceback when Python tears it down."""
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted, and may set no handler
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def renderer_name(physics: Any) -> tuple[str, bool]:
    """What draws the pictures, as OpenGL names it, and whether that is software on the CPU.

    Args:
        physics: dm_control's, of any task.
    """
    from OpenGL import GL

    contexts = physics.contexts
    with contexts.gl.make_current() as context:
        name = context.call(GL.glGetString, GL.GL_RENDERER)
    name = name.decode() if name else "unknown"
    return f"{name} through {os.environ.get('MUJOCO_GL', 'the default backend')}", any(
        word in name.lower() for word in _SOFTWARE
    )
