"""The Control Suite wrapper against dm_control used directly."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from dm_control.rl.control import PhysicsError

import dmc2gym
from dmc2gym import rendering

ROOT = Path(__file__).parent.parent
os.environ.setdefault("LP_NUM_THREADS", "1")  # more threads of Mesa take more processor time for small pictures


@pytest.fixture
def make():
    """dmc2gym.make with small shadows, which are drawn faster. Closes the environments at the end of the test."""
    made = []

    def make_and_remember(*args, **kwargs):
        made.append(dmc2gym.make(*args, **kwargs))
        made[-1].physics.model.vis.quality.shadowsize = 128
        return made[-1]

    yield make_and_remember
    for env in made:
        env.close()


def actions(shape, count):
    return np.random.default_rng(0).uniform(-1, 1, (count, *shape)).astype(np.float32)


def play(env, count, reset_seed=None):
    """The observations and rewards of an episode's begin as bytes."""
    observations = [env.reset(seed=reset_seed)[0].tobytes()]
    steps = [env.step(action) for action in actions(env.action_space.shape, count)]
    return observations + [obs.tobytes() + np.float64(reward).tobytes() for obs, reward, *_ in steps]


@pytest.mark.parametrize(("domain", "task"), dmc2gym.task_names())
def test_every_task_works_on_states_without_a_renderer(make, domain, task):
    """A seed alone determines an episode, whatever was played before."""
    env = make(domain, task)
    episodes = [play(env, 3, reset_seed=seed) for seed in (1, 2, 1)]
    assert episodes[0] == episodes[2] != episodes[1]
    assert not env.unwrapped.physics._contexts
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs in env.observation_space
    assert np.array_equal(obs, env.unwrapped.current_state)
    assert len(set(env.unwrapped.state_names)) == len(obs)
    assert isinstance(reward, float)
    assert type(terminated) is type(truncated) is bool
    assert {"internal_state", "discount"} <= set(info)


@pytest.mark.parametrize(("domain", "task"), dict(dmc2gym.task_names()).items())  # the last task of each domain
def test_every_domain_works_on_pixels(make, domain, task):
    env = make(domain, task, from_pixels=True, height=16, width=20)
    env.reset()
    obs, *_ = env.step(env.action_space.sample())
    assert (obs.shape, obs.dtype) == ((3, 16, 20), np.uint8)
    assert obs in env.observation_space
    assert env.current_state in env.state_space
    assert env.render(mode="rgb_array", height=8, width=12, camera_id=0).shape == (8, 12, 3)


@pytest.mark.parametrize(("domain", "task", "repeat", "decisions"), [
    ("cheetah", "run", 4, 30), ("cartpole", "swingup", 8, 30), ("humanoid", "walk", 1, 30),
    ("cheetah", "run", 3, 334),  # 1000 environment steps are 333 decisions of 3 and one of 1
])  # fmt: skip
def test_equals_dm_control(make, domain, task, repeat, decisions):
    """The same actions give the same observations, rewards, discounts and ends."""
    from dm_control import suite

    env, direct = make(domain, task, seed=5, frame_skip=repeat), suite.load(domain, task, {"random": 5})
    direct.reset()
    env.reset()
    for action in actions(env.action_space.shape, decisions):
        obs, reward, terminated, truncated, info = env.step(action)
        want = 0.0
        for _ in range(repeat):
            time_step = direct.step(action)
            want += time_step.reward
            if time_step.last():
                break
        assert np.array_equal(obs, np.concatenate([np.ravel(value) for value in time_step.observation.values()]))
        assert reward == want
        assert info["discount"] == time_step.discount
        assert np.array_equal(info["internal_state"], direct.physics.get_state())
        assert (terminated, truncated) == (False, time_step.last())
    assert truncated == (decisions == 334)


def test_the_physics_of_states_can_be_drawn(make):
    """As a wrapper of one's own may do, before anything else has started a renderer."""
    env = make("ball_in_cup", "catch")
    env.reset(seed=1)
    picture = env.unwrapped.physics.render(20, 60, camera_id=1)
    assert np.array_equal(picture, env.render(height=20, width=60, camera_id=1))


@pytest.mark.parametrize(("domain", "task", "camera"), [("ball_in_cup", "catch", 0), ("quadruped", "walk", 2)])
def test_pixels_are_dm_controls(make, domain, task, camera):
    """In either layout; they never show the reward."""
    options = {"from_pixels": True, "height": 40, "width": 48}
    first = make(domain, task, visualize_reward=False, **options)
    last = make(domain, task, channels_first=False, **options)
    assert np.array_equal(first.reset()[0].transpose(1, 2, 0), last.reset()[0])
    physics = first.unwrapped.physics
    for action in actions(first.action_space.shape, 3):
        channels_first, channels_last = first.step(action)[0], last.step(action)[0]
        assert np.array_equal(channels_last, physics.render(40, 48, camera_id=camera))
        assert np.array_equal(channels_last, channels_first.transpose(1, 2, 0))
    assert np.array_equal(first.render(height=20, width=60, camera_id=1), physics.render(20, 60, camera_id=1))
    obs, _ = make(domain, task, camera_id=1, channels_first=False, **options).reset(seed=3)
    first.reset(seed=3)
    assert np.array_equal(obs, first.render(camera_id=1))


def test_observations_that_nobody_sees_are_not_computed(make, monkeypatch):
    """One a decision, the last one; also where the episode ends among the repeats."""
    flat_kwargs = {"flat_observation": True, "n_sub_steps": 2}
    env = make("cartpole", "swingup", frame_skip=3, time_limit=0.16, environment_kwargs=flat_kwargs)
    env.reset()
    times, task = [], type(env.unwrapped._env.task)
    compute = task.get_observation
    monkeypatch.setattr(task, "get_observation", lambda *args: times.append(args[1].time()) or compute(*args))
    assert [env.step(np.full(1, 0.5))[3] for _ in range(3)] == [False, False, True]
    assert times == pytest.approx([0.06, 0.12, 0.16])


def test_sizes_of_pictures(make):
    """Also larger than the model's own buffer; a plain picture has the render size, or that of the observations."""
    env = make("cartpole", "swingup", from_pixels=True, height=500, width=700, render_size=32)
    small = make("cartpole", "swingup", visualize_reward=False, height=16, width=20)
    obs, _ = env.reset()
    small.reset()
    assert small.render().shape == (16, 20, 3)
    assert np.array_equal(env.render(), small.render(height=32, width=32))
    assert np.array_equal(small.render(height=500, width=700), obs.transpose(1, 2, 0))


@pytest.mark.parametrize(("domain", "task"), [("reacher", "easy"), ("lqr", "lqr_6_2")])
def test_same_seed_same_episodes(make, domain, task):
    first, second, other = (make(domain, task, seed) for seed in (3, 3, 4))
    episodes = [[play(env, 5) for _ in range(2)] for env in (first, second, other)]
    assert episodes[0] == episodes[1]
    assert episodes[0] != episodes[2]
    assert episodes[0][0] != episodes[0][1]
    assert np.array_equal(*([env.action_space.sample() for _ in range(3)] for env in (first, second)))
    if domain == "reacher":  # the seed of `reset` alone determines an episode, but for LQR's springs
        assert play(first, 5, reset_seed=11) == play(other, 5, reset_seed=11)


@pytest.mark.parametrize(("options", "decisions"), [
    ({"frame_skip": 8}, 125), ({"frame_skip": 3}, 334),  # rounded up to whole decisions
    ({"frame_skip": 4, "episode_length": 10}, 3), ({"time_limit": 0.05}, 5),  # seconds of 0.01
])  # fmt: skip
def test_time_limits(make, options, decisions):
    """A thousand environment steps unless told otherwise; the task has not ended."""
    env = make("cartpole", "swingup", **options)
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(1))[2:4] for _ in range(decisions)]
        assert ends == [*[(False, False)] * (decisions - 1), (False, True)]


def test_true_end(make, monkeypatch):
    """A task ends with discount 0: nothing that follows is worth anything."""
    env = make("lqr", "lqr_2_1", seed=1)
    env.reset()
    monkeypatch.setattr(env.unwrapped._env.task, "get_termination", lambda physics: 0.0)
    _, _, terminated, truncated, info = env.step(np.zeros(1))
    assert (terminated, truncated, info["discount"]) == (True, False, 0)


def test_actions_are_scaled_to_the_tasks_limits(make):
    env = make("quadruped", "walk")
    limits = env.unwrapped._env.action_spec()
    assert limits.maximum.max() > 1
    env.reset()
    for action, want in ((1, limits.maximum), (-1, limits.minimum), (0, (limits.maximum + limits.minimum) / 2)):
        env.step(np.full(12, action))
        assert np.allclose(env.unwrapped.physics.control(), want)
    env = make("lqr", "lqr_2_1")  # without limits: as they are
    env.reset()
    env.step(np.array([0.25]))
    assert env.unwrapped.physics.control() == pytest.approx([0.25])


@pytest.mark.parametrize(("call", "words"), [
    (lambda env: env.step(np.full(6, 1.5)), "actions are"), (lambda env: env.step(np.full(6, np.nan)), "actions are"),
    (lambda env: env.step(np.zeros(5)), "actions are"), (lambda env: env.render(mode="human"), "render mode 'human'"),
    (lambda _: dmc2gym.make("cheetah", "fly"), "no task cheetah fly"),
    (lambda _: dmc2gym.make("cheetah", "run", frame_skip=0), "at least 1"),
])  # fmt: skip
def test_what_is_refused(make, call, words):
    env = make("cheetah", "run")
    env.reset()
    with pytest.raises(ValueError, match=words):
        call(env)


def test_renderer_of_any_environment(make):
    import gymnasium
    from gym.wrappers import ClipAction
    from shimmy import GymV26CompatibilityV0

    env = make("cartpole", "swingup")
    name, software = dmc2gym.renderer_of(env)
    assert name.endswith(f" through {os.environ['MUJOCO_GL']}")
    assert type(software) is bool
    shown = gymnasium.wrappers.TimeLimit(GymV26CompatibilityV0(env=ClipAction(env)), 5)
    assert dmc2gym.renderer_of(shown) == (name, software)
    assert dmc2gym.renderer_of(gymnasium.wrappers.TimeLimit(gymnasium.Env(), 5)) is None


def run_python(program, **environment):
    """What a program in a fresh process prints; of this process's environment only what is given here."""
    environment = {"PATH": "/usr/bin:/bin", "LP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.stderr == ""
    return result.stdout


def test_triton_is_imported_before_anything_can_render(tmp_path):
    """Its LLVM and Mesa's crash in the other order; PyTorch imports it with the first optimizer."""
    (tmp_path / "triton.py").write_text("import sys; print([name for name in sys.modules if 'dmc2gym.' in name])")
    assert run_python("import dmc2gym", PYTHONPATH=str(tmp_path), MUJOCO_GL="disabled") == "[]\n"


def test_trials_of_renderers(tmp_path, monkeypatch):
    """They import nothing from the current folder; one that cannot be made says nothing about the renderer."""
    (tmp_path / "numpy.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert rendering._works(os.environ["MUJOCO_GL"])
    assert not rendering._works("vulkan")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert rendering._works("egl")


STATES_THEN_PIXELS = """
import os, sys, dmc2gym
print(os.environ["MUJOCO_GL"], "dm_control._render" in sys.modules)
for from_pixels in (False, True):
    try:
        env = dmc2gym.make("quadruped", "escape", from_pixels=from_pixels)
        env.reset()
        env.step(env.action_space.sample())
        print("works", dmc2gym.renderer_of(env)[0] if from_pixels else "")
    except ValueError as error:
        print(error)
"""


def test_an_automatic_choice_falls_back_where_egl_loads_but_does_not_work():
    choice, states, pixels = run_python(STATES_THEN_PIXELS, __EGL_VENDOR_LIBRARY_DIRS="/nonexistent").splitlines()
    backend, imported = choice.split()  # dm_control reads the choice when it is imported
    assert (imported, states) == ("False", "works ")
    assert {"osmesa": "through osmesa", "disabled": "__EGL_VENDOR_LIBRARY_DIRS=/nonexistent"}[backend] in pixels


@pytest.mark.parametrize(("chosen", "states_work"), [
    ({"MUJOCO_EGL_DEVICE_ID": "999"}, True), ({"PYOPENGL_PLATFORM": "glx"}, True), ({"MUJOCO_GL": "glfw"}, True),
    ({"MESA_GL_VERSION_OVERRIDE": "1.0"}, True), ({"MUJOCO_GL": "vulkan"}, False),
    ({"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent"}, False),
])  # fmt: skip
def test_a_choice_of_the_user_that_does_not_work_is_named(chosen, states_work):
    """Where dm_control can be imported with it, states do without a renderer."""
    _, states, pixels = run_python(STATES_THEN_PIXELS, **chosen).splitlines()
    assert (states == "works ") == states_work
    for line in {states, pixels} - {"works "}:
        assert line.startswith("no usable renderer (")
        assert "apt-get install libegl1" in line
        assert all(f"{variable}={value}" in line for variable, value in chosen.items())


@pytest.mark.parametrize(("device", "visible", "works", "chosen"), [
    ("cuda:1", None, {"1"}, "1"), ("cuda:1", "2,5", {"1", "2", "5"}, "5"), ("cuda", "3", {"3"}, "3"),
    ("cuda", "3", set(), None),  # a container hides the others
    ("cuda:1", "GPU-8a,GPU-9b", {"0", "1"}, None), ("cuda", None, {"0"}, None), ("cpu", "3", {"3"}, None),
])  # fmt: skip
def test_the_renderer_follows_the_device(monkeypatch, device, visible, works, chosen):
    """With fakes: which GPUs there are, and on which of them EGL draws."""
    environ = {"MUJOCO_GL": "egl"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(rendering, "_works", lambda _, **variables: variables["MUJOCO_EGL_DEVICE_ID"] in works)
    dmc2gym.render_on(device)
    assert environ.get("MUJOCO_EGL_DEVICE_ID") == chosen
    environ["MUJOCO_EGL_DEVICE_ID"] = "4"  # the user's own
    dmc2gym.render_on(device)
    assert environ["MUJOCO_EGL_DEVICE_ID"] == "4"


def test_a_terrain_is_drawn_as_it_was_made(make):
    """A renderer that starts after a reset shows the terrain of that reset, and later ones theirs."""
    late, early = make("quadruped", "escape"), make("quadruped", "escape", from_pixels=True)
    for seed in (3, 4):
        late.reset(seed=seed)
        assert np.array_equal(late.render(), early.reset(seed=seed)[0].transpose(1, 2, 0))


@pytest.mark.parametrize(("from_pixels", "frame_skip"), [(False, 1), (True, 4)])
def test_a_simulation_that_diverges_ends_the_episode(make, from_pixels, frame_skip):
    env = make("cheetah", "run", from_pixels=from_pixels, frame_skip=frame_skip)
    env.reset(seed=1)
    before, *_ = env.step(np.ones(6, np.float32))
    env.unwrapped.physics.data.qvel[:] = 1e12
    obs, reward, terminated, truncated, info = env.step(np.ones(6, np.float32))
    assert np.array_equal(obs, before)
    assert (reward, terminated, truncated, info["discount"]) == (0.0, True, False, 0.0)
    assert "mjWARN_BADQ" in info["physics_error"]
    fresh = make("cheetah", "run", from_pixels=from_pixels, frame_skip=frame_skip)
    assert play(env, 3, reset_seed=2) == play(fresh, 3, reset_seed=2)


@pytest.mark.parametrize(("failures", "outcome"), [(9, nullcontext()), (10, pytest.raises(PhysicsError))])
def test_a_simulation_that_diverges_at_a_reset_is_reset_again(make, failures, outcome):
    env = make("cheetah", "run")
    env.unwrapped._env.task.initialize_episode = Mock(side_effect=[PhysicsError("invalid")] * failures + [None])
    with outcome:
        assert env.reset(seed=1)[0].shape == (17,)


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_programs_end_silently(backend):
    """Whether an environment was closed, closed twice, deleted or left open."""
    program = (
        "import dmc2gym\n"
        "try:\n"
        "    envs = [dmc2gym.make('cartpole', 'swingup', from_pixels=True, height=8, width=8) for _ in range(3)]\n"
        "    drawn = [env.reset() for env in envs]\n"
        "except ValueError: print('no such renderer here'); raise SystemExit\n"
        "envs[0].close(); envs[0].close(); del envs[1]; print('drawn')"
    )
    assert run_python(program, MUJOCO_GL=backend)  # and nothing on stderr
