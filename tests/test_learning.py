"""It learns: the whole program on a task from pixels that takes seconds."""

from __future__ import annotations

import numpy as np
import pytest
from runs import read_log
from toy import BarEnv

import train
from utils import FrameStack

FLAGS = (
    "--image_size 24 --num_layers 2 --num_filters 8 --hidden_dim 64 --batch_size 32 --encoder_feature_dim 10 "
    "--discount 0.9 --init_steps 200 --num_train_steps 600 --eval_freq 600 --num_eval_episodes 10 --eval_workers 1 "
    "--device cpu"
).split()


@pytest.mark.parametrize("decoder_type", ["pixel", "identity"])
def test_learns_from_pixels(tmp_path, monkeypatch, decoder_type):
    env, returns = BarEnv(), []
    env.action_space.seed(0)
    for seed in range(500):
        env.reset(seed=seed)
        returns.append(sum(env.step(env.action_space.sample())[1] for _ in range(20)))

    reconstruction_losses, update = [], train.SacAeAgent.update

    def update_and_note(*args):
        reconstruction_losses.append(float(update(*args).get("train_ae/ae_loss", 0)))

    monkeypatch.setattr(train.SacAeAgent, "update", update_and_note)
    monkeypatch.setattr(train, "make_env", lambda args, seed: FrameStack(BarEnv(), args.frame_stack))
    assert train.main([*FLAGS, "--decoder_type", decoder_type, "--work_dir", str(tmp_path)]) == 0
    # At best some 18: 20 decisions, of which the first three move the bar to the middle.
    assert read_log(tmp_path / "eval.log")[-1]["episode_reward"] > 15 > 2 * np.mean(returns)
    assert len(reconstruction_losses) == 200 + 399
    if decoder_type == "pixel":
        assert np.mean(reconstruction_losses[-20:]) < reconstruction_losses[0] / 3
