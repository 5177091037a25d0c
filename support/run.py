"""A training run: its progress, and how it is saved and restored."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent import Agent
from files import write_json, write_tensors, writing
from randomness import seed_of
from support import report
from support.checks import changes
from support.flags import OneLineParser
from support.signals import Stop
from support.work_dir import INDEX, STATES, WorkDir


@dataclasses.dataclass
class Progress:
    """Where a run is. A checkpoint holds all of it."""

    step: int = 0  # decisions made
    updates: int = 0
    episode: int = 1  # number of the episode under way
    next_evaluation: int = 0  # evaluate at the first episode end at or after this step
    actions: list[Any] = dataclasses.field(default_factory=list)  # of the episode under way
    action: Any = None  # of the decision under way: chosen before its updates, which change the policy
    episode_return: float = 0.0
    seconds: float = 0.0  # that the episode under way has taken, evaluation excluded
    obs_crc: int | None = None  # of the observation, to see whether the environment repeats its episodes

    def under_way(self) -> bool:
        """Whether an episode is under way."""
        return bool(self.actions) or self.action is not None

    def evaluation_due(self) -> bool:
        """Whether an evaluation is due; never within an episode."""
        return not self.actions and self.step >= self.next_evaluation


class Run:
    """What the training loop works on. The program sets `video`, `eval_envs` and `lines`, which it prints first."""

    logger: Any
    video: Any
    eval_envs: Any
    lines: list[str]
    obs: np.ndarray
    episode_start: float  # by time.perf_counter; if the run was stopped in the episode, as if it had not been

    def __init__(self, args: argparse.Namespace, env: Any, agent: Agent, replay: Any):
        self.args, self.env, self.agent, self.replay = args, env, agent, replay
        self.progress, self.work_dir = Progress(), WorkDir(Path(args.work_dir))
        self.stop, self.pace = Stop(), report.Pace(agent.device)
        self._saved = (time.monotonic(), 0)  # when the last checkpoint was written or read, and its step
        self._state = ""  # its file of tensors

    def open(self, parser: OneLineParser, make_logger: Callable[..., Any]) -> list[str]:
        """Starts the run in its folder, or restores the checkpoint in it; lines to print.

        `make_logger` takes the `state` of the logger before; None if there was none. Raises UserError if the checkpoint
        cannot be used; nothing has been changed then. Raises UserError if the folder cannot be written.
        """
        args, work_dir, path = self.args, self.work_dir, self.work_dir.path
        if args.resume and work_dir.checkpoint.exists():
            lines, logger_state = self._restore(parser)
        else:
            begun = args.resume and work_dir.checkpoint.begun()
            noted = changes(args, parser, work_dir.checkpoint.read()["args"]) if begun else []
            lines, logger_state = [*noted, *work_dir.begin(vars(args), args.resume)], None
        before = set(path.glob("tb/*"))
        self.logger = make_logger(state=logger_state)  # checks its files before anything is changed
        if logger_state is not None:  # so that the next start finds these flags, even if this one is killed
            changed = {"args": vars(args), "progress": vars(self.progress)}
            work_dir.checkpoint.write(**work_dir.checkpoint.read() | changed)
        # A copy of the folder may lack the list of the run's files, but its checkpoint names those that belong to it.
        work_dir.note(*set(path.glob("tb/*")) - before, *work_dir.checkpoint.files())
        write_json(path / "args.json", dict(sorted(vars(args).items())))
        start = report.provenance(self.agent.device) | {"step": self.progress.step}
        with writing(path / "starts.log"), (path / "starts.log").open("a") as file:
            file.write(json.dumps(start) + "\n")
        return lines

    def _restore(self, parser: OneLineParser) -> tuple[list[str], dict[str, Any]]:
        """Restores the checkpoint; lines to print, and the logger's state.

        Raises UserError if a file, which is named, is missing, damaged or foreign, or if the replay is too small.
        """
        device, dtype, checkpoint = self.agent.device, self.env.action_space.dtype, self.work_dir.checkpoint
        content, tensors = checkpoint.read(), checkpoint.tensors(device)
        self.replay.files.load_chunks(checkpoint.folder, content["replay"])
        self.agent.load_state_dict(tensors["agent"])
        torch.set_rng_state(tensors["random"]["cpu"].cpu())
        if "cuda" in tensors["random"] and device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random"]["cuda"].cpu(), device)
        self.progress = now = Progress(**content["progress"])
        self._saved, self._state = (time.monotonic(), now.step), content["state"][0]
        now.actions = [np.asarray(action, dtype) for action in now.actions]
        now.action = None if now.action is None else np.asarray(now.action, dtype)
        eval_freq, last_end = self.args.eval_freq, now.step - len(now.actions)
        if content["args"]["eval_freq"] != eval_freq and not now.evaluation_due():
            now.next_evaluation = (last_end // eval_freq + 1) * eval_freq
        end = f"the run has ended at step {now.step}: more --num_train_steps would take it further"
        last_line = end if self.ended() else f"resuming at step {now.step}"
        return [*changes(self.args, parser, content["args"]), last_line], content["logger"]

    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.progress.step >= self.args.num_train_steps and not self.progress.evaluation_due()

    def begin_episode(self) -> np.ndarray:
        """The first observation of an episode; of an interrupted one, the current one: its actions are repeated.

        If the environment does not repeat its episodes under the same seed, this prints a line, and the episode begins
        anew.
        """
        now, seed = self.progress, seed_of(self.args.seed, "training", self.progress.episode)
        self.obs, _ = self.env.reset(seed=seed)
        for action in now.actions:
            self.obs, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                break
        if now.obs_crc not in (None, zlib.crc32(self.obs.tobytes())):
            report.say(
                "warning: the environment does not repeat its episodes under the same seed: the one under way begins "
                "anew, and the run will differ from one that never stopped"
            )
            now.actions, now.action, now.episode_return, now.seconds = [], None, 0.0, 0.0
            self.obs, _ = self.env.reset(seed=seed)
        now.obs_crc = None
        self.episode_start = time.perf_counter() - now.seconds
        return self.obs

    def note_time(self) -> None:
        """Notes how long the episode under way has taken, if there is one."""
        if self.progress.under_way():
            self.progress.seconds = time.perf_counter() - self.episode_start

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due; never within an episode."""
        args, step, (last_time, last_step) = self.args, self.progress.step, self._saved
        old = time.monotonic() - last_time >= 60 * args.checkpoint_minutes
        old = old or (args.checkpoint_freq is not None and step - last_step >= args.checkpoint_freq)
        return not self.progress.actions and step > last_step and old

    def save_checkpoint(self) -> None:
        """Writes a checkpoint: of the replay what is new, tensors, then the index, which makes it the run's.

        Raises UserError if that fails; the one before it is still there then.
        """
        now, device, folder = self.progress, self.agent.device, self.work_dir.checkpoint.folder
        now.obs_crc = zlib.crc32(self.obs.tobytes()) if now.under_way() else None
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        replay = self.replay.files.save_chunks(folder, self.work_dir)
        state = STATES[self._state == STATES[0]]
        self.work_dir.claim(folder / state)
        crc32 = write_tensors(folder / state, {"agent": self.agent.state_dict(), "random": random})
        content = {"progress": vars(now), "logger": self.logger.state(now.step), "state": (state, crc32)}
        self.work_dir.checkpoint.write(vars(self.args), replay=replay, **content)
        self.work_dir.remove(folder, keep=[INDEX, state, *(chunk.name for chunk in replay["chunks"])])
        self._saved, self._state = (time.monotonic(), now.step), state

    def save_models(self) -> None:
        """Writes networks and replay, if asked for."""
        args, step, path = self.args, self.progress.step, self.work_dir.path
        if args.save_model:
            self.work_dir.claim(*(path / "model" / f"{name}_{step}.pt" for name in self.agent.saved_states()))
            self.agent.save(path / "model", step)
        if args.save_buffer:
            self.replay.files.save(path / "buffer", self.work_dir)

    def save_video(self) -> None:
        """Writes the recorded episode, if one was, as an mp4 and, thinned to about 100 frames, for TensorBoard."""
        video, step = self.video, self.progress.step
        if video.enabled:
            if self.args.save_video:
                self.work_dir.claim(self.work_dir.path / "video" / f"{step}.mp4")
                video.save(f"{step}.mp4")
            self.logger.log_video("eval/video", video.frames[:: -(-len(video.frames) // 100)], step)
            video.init(enabled=False)  # lets go of the frames
