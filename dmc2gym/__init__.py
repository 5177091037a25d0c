"""The Control Suite as gym 0.26 environments.

The import chooses MuJoCo's renderer, because dm_control reads that choice when it is imported.
"""

import contextlib

# Triton (part of PyTorch's CUDA build) crashes if it is imported after Mesa has loaded another LLVM. So it comes first.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

from dmc2gym.rendering import choose_backend, render_on
from dmc2gym.wrappers import DMCWrapper, make, renderer_of, task_names

choose_backend()

__all__ = ["DMCWrapper", "make", "render_on", "renderer_of", "task_names"]
