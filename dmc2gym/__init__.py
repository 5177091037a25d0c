"""The Control Suite as gym 0.26 environments.

Importing this package chooses MuJoCo's renderer, which must happen before dm_control is imported.
"""

import contextlib

# PyTorch's CUDA build brings Triton, which crashes where it is imported after Mesa has loaded another LLVM to render.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

from dmc2gym.rendering import RendererError, choose_backend, renderer_name
from dmc2gym.wrappers import DMCWrapper, make, task_names

choose_backend()

__all__ = ["DMCWrapper", "RendererError", "make", "renderer_name", "task_names"]
