"""Chooses and starts MuJoCo's renderer."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from errors import UserError

# Variables that begin so choose a renderer or a driver. If rendering fails, the message names those that are set.
_VARIABLES = (
    *("MUJOCO_GL", "MUJOCO_EGL", "PYOPENGL_PLATFORM", "EGL_PLATFORM", "__EGL_VENDOR", "GALLIUM_DRIVER"),
    *("LIBGL_", "MESA_GL", "MESA_LOADER"),
)


def choose_backend() -> None:
    """Sets MUJOCO_GL on Linux, unless the user has: "egl" (needs no display), else "osmesa", else "disabled".

    A backend can load and still not work, so each one is tried, in a subprocess, because a failure leaves PyOpenGL
    unusable. On other systems dm_control chooses.
    """
    # OSMesa would draw in a thread, which ends before its contexts are freed at exit: that prints tracebacks.
    os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "true")
    if os.environ.get("MUJOCO_GL") or sys.platform != "linux":
        return
    # A user who names a GPU for EGL does not want software on the CPU instead.
    backends = ["egl"] if "MUJOCO_EGL_DEVICE_ID" in os.environ else ["egl", "osmesa"]
    os.environ["MUJOCO_GL"] = next(filter(_works, backends), "disabled")


def render_on(device: str) -> None:
    """Has EGL draw on the GPU of a PyTorch device, such as cuda:1, unless the user has chosen one.

    PyTorch numbers the GPUs of CUDA_VISIBLE_DEVICES, EGL all of them. Where EGL cannot draw on that one, for example in
    a container that hides the others, it goes on choosing. Call this before the first environment is made.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or os.environ.get("MUJOCO_GL") != "egl" or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers, or names that EGL does not know
    number = dict(enumerate(visible.split(","))).get(int(index or 0), "") if visible else index
    if number.isdecimal() and number != "0" and _works("egl", MUJOCO_EGL_DEVICE_ID=number):  # 0 is EGL's own choice
        os.environ["MUJOCO_EGL_DEVICE_ID"] = number


def _works(backend: str, **variables: str) -> bool:
    """Whether a renderer starts with this backend. The trial takes a third of a second."""
    # -P: nothing is imported from the current folder.
    command = [sys.executable, "-P", "-c", "from dm_control._render import Renderer; Renderer(8, 8).free()"]
    environment = os.environ | {"MUJOCO_GL": backend} | variables
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False
    except OSError:  # no process can be started, which says nothing about renderers
        return True


def renderer_error(cause: Exception) -> UserError:
    """Makes the error for users: the cause, what to install, and the variables that may be wrong."""
    found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(_VARIABLES)]
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return UserError(
        f"no usable renderer ({reason}). Either install one, on Debian or Ubuntu by: apt-get install libegl1 "
        f"libgl1-mesa-dri libopengl0; or choose another by MUJOCO_GL; set are {', '.join(found) or 'no variables'}"
    )


def start_renderer(physics: Any, height: int = 0, width: int = 0) -> None:
    """Starts the renderer of dm_control's physics, again if its buffer is too small. Raises UserError."""
    visual = physics.model.vis.global_
    try:
        if height > visual.offheight or width > visual.offwidth:
            visual.offheight, visual.offwidth = max(height, visual.offheight), max(width, visual.offwidth)
            if physics._contexts:
                physics._free_rendering_contexts()
        _ = physics.contexts  # dm_control starts the renderer here
    except Exception as error:  # each backend and driver raises its own kinds
        from dm_control.mujoco.wrapper.core import MjrContext

        # Its __del__ calls `_ptr`, which a context lacks whose __init__ has failed: that would print a traceback.
        MjrContext._ptr = lambda _: None
        raise renderer_error(error) from error
