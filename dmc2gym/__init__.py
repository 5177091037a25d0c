"""The Control Suite as gym 0.26 environments.

Importing this package chooses MuJoCo's renderer, which must happen before dm_control is imported.
"""

from dmc2gym.rendering import RendererError, choose_backend, renderer_name
from dmc2gym.wrappers import DMCWrapper, make, task_names

choose_backend()

__all__ = ["DMCWrapper", "RendererError", "make", "renderer_name", "task_names"]
