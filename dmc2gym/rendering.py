"""Choice of MuJoCo's renderer: it happens through the environment, once, before dm_control is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What users set to choose a renderer or a driver; where drawing fails, those that are set are the suspects.
_VARIABLES = (
    *("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "EGL_PLATFORM", "GALLIUM_DRIVER"),
    *("__EGL_VENDOR_LIBRARY_DIRS", "__EGL_VENDOR_LIBRARY_FILENAMES", "LIBGL_DRIVERS_PATH"),
)
_CHOSEN = "DMC2GYM_RENDERER"  # what `choose_backend` has put into MUJOCO_GL, here or in a process above this one
_TRIAL = "from dm_control._render import Renderer; Renderer(8, 8).free()"
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")
INSTALL_HINT = "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri libopengl0"


class RendererError(RuntimeError):
    """Nothing here can render; the message says what helps."""


def choose_backend() -> None:
    """Sets MUJOCO_GL on Linux unless the user has: EGL, which needs no display, or OSMesa, or none.

    A library that loads may still not work, so each is tried. That happens in a process of its own, for what has
    failed in one leaves PyOpenGL unusable there. Elsewhere the choice stays with dm_control.
    """
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return
    # Who names a GPU for EGL does not want to be drawn for by software on the CPU.
    backends = ["egl"] if "MUJOCO_EGL_DEVICE_ID" in os.environ else ["egl", "osmesa"]
    working = (backend for backend in backends if _works(backend))
    os.environ["MUJOCO_GL"] = os.environ[_CHOSEN] = next(working, "disabled")


def _works(backend: str) -> bool:
    """Whether a renderer starts here; a third of a second."""
    command = [sys.executable, "-c", _TRIAL]
    try:
        return not subprocess.run(
            command, env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, timeout=60, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def renderer_error(cause: Exception) -> RendererError:
    """What to tell a user where drawing has failed: why, and the variables to look at, or else what to install."""
    # Not what this program has chosen itself, nor what dm_control sets after it.
    ours = {"MUJOCO_GL": os.environ.get(_CHOSEN), "PYOPENGL_PLATFORM": os.environ.get("MUJOCO_GL")}
    found = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name) not in (None, ours.get(name))}
    named = ", ".join(f"{name}={value}" for name, value in found.items())
    reason = " ".join(str(cause).split()) or type(cause).__name__
    advice = f"{named} is set: unset it, or choose another value" if named else INSTALL_HINT
    return RendererError(f"no usable renderer ({reason}); {advice}")


@contextmanager
def not_started(physics: Any) -> Iterator[None]:
    """Within it, a simulation that has drawn nothing yet has no renderer, and makes none.

    A task may ask for one at a reset, to tell it what has changed (quadruped escape: its terrain). One that is made
    later sees the change anyway.
    """
    if physics._contexts:
        yield
        return
    kind = type(physics)
    physics.__class__ = type(kind.__name__, (kind,), {"contexts": None})
    try:
        yield
    finally:
        physics.__class__ = kind


def check_display() -> None:
    """Raises RuntimeError for GLFW without a display, which would only fail after many lines of its own."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    if os.environ.get("MUJOCO_GL") == "glfw" and sys.platform.startswith("linux") and not any(map(os.getenv, displays)):
        raise RuntimeError("it needs a display, and there is none")


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
