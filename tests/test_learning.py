"""It learns: the whole program on a task from pixels that takes seconds."""

from __future__ import annotations

import numpy as np
import pytest
from test_train import read_log, run_toy
from toy import BarEnv

import train


@pytest.mark.parametrize("decoder_type", ["pixel", "identity"])
def test_learns_from_pixels(tmp_path, monkeypatch, decoder_type):
    env = BarEnv()
    env.action_space.seed(0)
    returns = []
    for seed in range(500):
        env.reset(seed=seed)
        returns.append(sum(env.step(env.action_space.sample())[1] for _ in range(20)))
    random_return = np.mean(returns)

    flags = "--image_size 24 --num_filters 8 --hidden_dim 64 --batch_size 32 --encoder_feature_dim 10 --init_steps 200"
    flags += " --num_train_steps 600 --eval_freq 600 --num_eval_episodes 10 --discount 0.9"
    reconstruction_losses = []
    update = train.SacAeAgent.update

    def update_and_note(*args):
        metrics = update(*args)
        reconstruction_losses.append(float(metrics.get("train_ae/ae_loss", 0)))

    monkeypatch.setattr(train.SacAeAgent, "update", update_and_note)
    run_toy(tmp_path, monkeypatch, BarEnv, *flags.split(), "--decoder_type", decoder_type)
    evaluations = read_log(tmp_path / "log" / "eval.log")
    # At best some 18: 20 decisions, of which the first three move the bar to the middle.
    assert evaluations[-1]["episode_reward"] > 15 > 2 * random_return
    assert len(reconstruction_losses) == 200 + 399
    if decoder_type == "pixel":
        assert np.mean(reconstruction_losses[-20:]) < reconstruction_losses[0] / 3
