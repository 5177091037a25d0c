"""Plays episodes with the models that a run has saved: `python evaluate.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from errors import UserError
from files import read_json, writing
from pictures import quality, rgb, side_by_side, some
from sac_ae import Count, Precision
from support import report
from support.checkpoint import find_models, load_agent
from support.evaluation import MAX_ENVS, SideBySide, current_states, play
from support.flags import OneLineParser, number, user_path
from support.machine import check_bf16, check_device, cores, try_out
from support.signals import Stop, Stopped
from utils import check_finite, set_seed_everywhere
from video import write_video

PANEL = 256  # height and width of each of a video's pictures
RIDGE = 1e-3  # penalty of --probe's fit, as a fraction of the features' variance


def make_parser() -> OneLineParser:
    """The command line. Flags of train.py may follow."""
    parser = OneLineParser(
        description="Plays episodes with saved models, acting by the policy's mean, and prints their returns.",
        epilog="Flags of train.py override those in the run's args.json. Without that file, add the run's flags.",
    )
    parser.add_argument("work_dir", type=user_path, help="a run's folder, or a folder of models")
    add = parser.section("what to play")
    add("step", number(int, 0), None, "decisions after which the models were saved; without it the newest")
    add("episodes", Count, 10, "episodes to play, up to ten side by side")
    add("seed", number(int, 0, 2**32 - 1), 1_000_000, "seed of the episodes, unlike those of training")
    add("video", user_path, None, "new mp4 file for a video of the first episode")
    add("probe", bool, False, "also print how well a linear map predicts the task's state from the encoder's features")
    add("eval_workers", Count, cores(), "processes for evaluation, at most one per episode; 1: no extra process")
    add("device", str, "cuda" if torch.cuda.is_available() else "cpu", "device of the networks")
    add("precision", Precision | None, None, "precision of layers; without it the run's")
    return parser


def run_folder(path: Path) -> Path:
    """The run's folder: `path`, which may also be the folder `model` in it."""
    is_model = path.absolute().name == "model" and not (path / "args.json").exists()
    return path.absolute().parent if is_model else path


def training_flags(path: Path, words: list[str]) -> argparse.Namespace:
    """The flags that the models were trained with: those of an args.json, if it is there, and `words`.

    A value there that train.py would not take, as the authors' script may, is a note on stderr, and the flag's default.
    """
    parser = train.make_parser()
    content, given = read_json(path) if path.exists() else {}, parser.given(words)
    if useless := given.keys() & {"load_encoder", "load_step"}:
        raise UserError(
            f"{', '.join(sorted(useless))}: only a new run loads an encoder; --step chooses the models to play"
        )
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no flags")
    flags = {}
    for name, value in content.items():
        if parser.resume.get(name) != "fixed" or value is None or name in given:
            continue
        if parser.allows(name, value):
            flags[name] = value
        else:
            report.say(f"note: {name} cannot be {value!r:.100}, as in {path}: without --{name} its default is used")
    return parser.parse_args(words, argparse.Namespace(**flags))


def check_video(path: Path) -> None:
    """Raises UserError if a video cannot be written there, which a small one, in a folder for a moment, shows."""
    if path.suffix != ".mp4":
        raise UserError(f"video {path} must end in .mp4")
    if os.path.lexists(path):
        raise UserError(f"video {path} exists already: choose another, or move it away")
    existing = next(part for part in path.absolute().parents if os.path.lexists(part))
    with writing(path), tempfile.TemporaryDirectory(prefix=".video.", dir=existing) as folder:
        trial = Path(folder) / path.name
        try:
            write_video(trial, [np.zeros((PANEL, PANEL, 3), np.uint8)])
        except UserError as error:
            raise UserError(str(error).replace(str(trial), str(path))) from error


class Player:
    """Saved models with their environments. `words` are flags of train.py.

    Raises UserError if what is asked for cannot be had; nothing has been written.
    """

    def __init__(self, args: argparse.Namespace, words: list[str], resources: ExitStack):
        work_dir, self.video = run_folder(Path(args.work_dir)), None if args.video is None else Path(args.video)
        if not work_dir.is_dir():
            hint = "first name a run's folder, or a folder of models; flags come after it"
            raise UserError(f"{work_dir} is not a folder: {hint}")
        self.folder, self.step, saved = find_models(work_dir, args.step)
        precision = [] if args.precision is None else ["--precision", args.precision]
        flags = training_flags(path := work_dir / "args.json", [*words, *precision])
        check_device(args.device)
        if args.precision == "bf16":  # that of the run was good where it was trained
            check_bf16(args.device)
        if self.video is not None:
            check_video(self.video)
        flags.device, flags.save_video, flags.save_tb = args.device, self.video is not None, False
        make_env = partial(train.make_env, flags, flags.seed)
        with closing(make_env()) as env:
            try_out(env, flags)
            self.state_names = names_to_probe(env, args.episodes) if args.probe else []
            set_seed_everywhere(flags.seed)  # as a run begins
            self.agent = train.make_agent(flags, env.observation_space.shape, env.action_space.shape)
            self.untrained = copy.deepcopy(self.agent) if args.probe else self.agent
        try:
            if saved is None:
                self.agent.load(self.folder, self.step)
            else:
                load_agent(self.agent, work_dir, saved)
        except UserError as error:
            hint = f"the flags are those of {path}, and those given replace them"
            if not path.exists():
                hint = "without an args.json give the flags that it was trained with"
            raise UserError(f"{error}; {hint}") from error
        self.agent.train(False)
        self.untrained.train(False)
        self.seeds = [episode_seed(args.seed, episode) for episode in range(args.episodes)]
        envs = SideBySide(make_env, min(args.episodes, MAX_ENVS), args.eval_workers)
        self.envs, self.stop = resources.enter_context(closing(envs)), Stop()
        self.seen: list[np.ndarray] = []  # observations of the first episode
        self.scenes: list[np.ndarray] = []  # rendered pictures of it, for the video
        # For the probe, of each observation: its episode, the features of both encoders (2, D), and the state (S,).
        self.probed: list[tuple[int, np.ndarray, np.ndarray]] = []

    def play(self) -> np.ndarray:
        """Plays the episodes and keeps what the first one shows; their returns (N,).

        Raises:
            UserError: an action is NaN or infinite, or an environment's process has died.
            Stopped: a signal has asked for it.
        """
        for moment in report.progress_bar(play(self.envs, self.seeds, self.act), "evaluation"):
            self.stop.check()
            if 0 in moment.obs:
                self.seen.append(moment.obs[0].copy())
                self.scenes += [] if self.video is None else [self.envs.render()]
            if self.state_names:
                self.note_features(moment.obs)
        for episode, error in moment.physics_errors.items():
            report.warn_of_divergence(f"episode {episode}, decision {moment.lengths[episode]}", error)
        return moment.returns

    def note_features(self, obs: dict[int, np.ndarray]) -> None:
        """Keeps the features of some episodes' observations, and the states that these show."""
        stacked, states = np.stack([*obs.values()]), self.envs.call(current_states, [None] * self.envs.num_envs)
        check_finite("the task's state", *states)
        features = [agent.features(stacked).cpu().numpy() for agent in (self.agent, self.untrained)]
        check_finite(f"a feature by the models of step {self.step}", *features)
        shown = [states[episode % len(states)] for episode in obs]
        self.probed += zip(obs, np.stack(features, axis=1), shown, strict=True)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Mean actions (N, A) for observations (N, ...)."""
        check_finite("the environment's observation", obs)
        actions = self.agent.select_actions(obs)
        if not np.isfinite(actions).all():
            raise UserError(f"the policy's action is NaN or infinite: the models of step {self.step} have diverged")
        return actions

    def probe(self) -> Iterator[str]:
        """Lines that say how well linear maps predict each dimension of the state from the features."""
        half = (len(self.seeds) + 1) // 2
        episodes, features, states = map(np.array, zip(*self.probed, strict=True))
        scores = [linear_fit(features[:, i], states, episodes < half) for i in (0, 1)]
        deviations = states[episodes >= half].std(axis=0)
        for name, score, untrained, deviation in zip(self.state_names, *scores, deviations, strict=True):
            r2 = "does not change" if np.isnan(score) else f"R2 {score:.4f}, of the untrained encoder {untrained:.4f}"
            yield f"{name}: {r2}; standard deviation {deviation:.4g}"
        if (varies := ~np.isnan(scores[0])).any():
            for name, over in (("mean", np.mean), ("median", np.median)):
                values = [over(each[varies]) for each in scores]
                yield "{}: R2 {:.4f}, of the untrained encoder {:.4f}".format(name, *values)
        yield f"fit on {half} of {len(self.seeds)} episodes; R2 and standard deviation are of the others"

    def pictures(self) -> Iterator[np.ndarray]:
        """The video's (H, W, 3): the scene and, of pixels, the newest observed frame and its reconstruction."""
        for scene, obs in zip(self.scenes, self.seen, strict=True):
            self.stop.check()
            stacks = [obs] if obs.ndim == 3 else []
            stacks += [self.agent.reconstruct(stack[None])[0] for stack in stacks if self.agent.decoder is not None]
            yield side_by_side([scene, *(rgb(stack).transpose(1, 2, 0) for stack in stacks)], PANEL)


def names_to_probe(env: Any, episodes: int) -> list[str]:
    """Names of a state's dimensions. Raises UserError if there is nothing to fit, or nothing to test the fit on."""
    if len(env.observation_space.shape) == 1:
        raise UserError("probe has nothing to fit: this run observes states")
    names, state = (getattr(env.unwrapped, name, ()) for name in ("state_names", "current_state"))
    if not 0 < len(names) == np.size(state):
        raise UserError("probe has nothing to fit: this environment has no state_names for its current_state")
    if episodes < 2:
        raise UserError("probe needs at least 2 episodes: it fits on half of them, and tests the fit on the others")
    return [*names]


def linear_fit(features: np.ndarray, states: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """How well a linear map predicts states (N, S) from features (N, D): R2 (S,), NaN where a state does not change.

    Ridge regression on the rows that the mask `fit` (N,) selects; R2 is of the others.
    """
    # Features are scaled to variance 1, so that the penalty does not depend on their size.
    x, y = features - features[fit].mean(axis=0, dtype=float), states - states[fit].mean(axis=0)
    x /= np.where((scale := x[fit].std(axis=0)) > 1e-6, scale, np.inf)
    gram = x[fit].T @ x[fit] + RIDGE * fit.sum() * np.eye(x.shape[1])
    residual = (y - x @ np.linalg.solve(gram, x[fit].T @ y[fit]))[~fit]
    variance = y[~fit].var(axis=0)
    return np.where(variance > 1e-12, 1 - (residual**2).mean(axis=0) / np.maximum(variance, 1e-12), np.nan)


def episode_seed(seed: int, episode: int) -> int:
    """Seed of an episode. Its formula is fixed: with `seed_of` the same --seed would select other episodes."""
    return int(np.random.SeedSequence((seed, episode)).generate_state(1)[0])


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser()
    args, words = parser.parse_known_args(argv)
    with report.one_line(parser.complain), ExitStack() as resources:
        with report.one_line(parser.error):
            player = Player(args, words, resources)
        resources.enter_context(player.stop.listen())
        try:
            report.show(f"models: {player.folder}, step {player.step}")
            returns = player.play()
            for episode, (seed, value) in enumerate(zip(player.seeds, returns, strict=True)):
                report.show(f"episode {episode}, seed {seed}: return {value:.4f}")
            report.show(f"mean {returns.mean():.4f}, standard deviation {returns.std():.4f}")
            shown = np.stack(some(player.seen))
            if player.agent.decoder is not None and shown.ndim == 4:
                alike = quality(shown, player.agent.reconstruct(shown))
                report.show("reconstruction: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}".format_map(alike))
            if args.probe:
                for line in player.probe():
                    report.show(line)
            if player.video is not None:
                write_video(player.video, player.pictures(), overwrite=False)
                report.show(f"video: {player.video}")
        except Stopped:
            return player.stop.exit_status(parser.prog)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
