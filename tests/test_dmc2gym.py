"""The Control Suite wrapper against dm_control used directly."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dmc2gym
from dmc2gym import rendering

ROOT = Path(__file__).parent.parent
os.environ.setdefault("LP_NUM_THREADS", "1")  # more threads of Mesa take more processor time for small pictures


def with_small_shadows(env):
    """Reduces the shadow map, which takes most of the time of a picture that is drawn in software."""
    env.physics.model.vis.quality.shadowsize = 128
    return env


@pytest.fixture
def make():
    """dmc2gym.make with small shadows. Closes the environments at the end of the test."""
    made = []

    def make_and_remember(*args, **kwargs):
        made.append(dmc2gym.make(*args, **kwargs))
        with_small_shadows(made[-1].unwrapped)
        return made[-1]

    yield make_and_remember
    for env in made:
        env.close()


def load(domain, task, seed, **task_kwargs):
    from dm_control import suite

    return with_small_shadows(suite.load(domain, task, task_kwargs={"random": seed, **task_kwargs}))


def flat(observation):
    return np.concatenate([np.ravel(value) for value in observation.values()])


def actions(shape, count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


@pytest.mark.parametrize(("domain", "task"), dmc2gym.task_names())
def test_every_task_works_on_states_without_a_renderer(make, domain, task):
    """A seed alone determines an episode, whatever was played before."""
    env = make(domain, task)
    episodes = [play(env, 3, reset_seed=seed) for seed in (1, 2, 1)]
    assert episodes[0] == episodes[2] != episodes[1]
    assert not env.unwrapped.physics._contexts
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs in env.observation_space
    assert obs.dtype == np.float64
    assert np.array_equal(obs, env.unwrapped.current_state)
    assert isinstance(reward, float)
    assert type(terminated) is type(truncated) is bool
    assert {"internal_state", "discount"} <= set(info)


@pytest.mark.parametrize(("domain", "task"), dict(dmc2gym.task_names()).items())  # the last task of each domain
def test_every_domain_works_on_pixels(make, domain, task):
    env = make(domain, task, from_pixels=True, height=16, width=20)
    env.reset()
    obs, *_ = env.step(env.action_space.sample())
    assert obs.shape == (3, 16, 20)
    assert obs.dtype == np.uint8
    assert obs in env.observation_space
    assert env.current_state.dtype == np.float64
    assert env.current_state in env.state_space
    assert env.render(mode="rgb_array", height=8, width=12, camera_id=0).shape == (8, 12, 3)


@pytest.mark.parametrize(
    ("domain", "task", "repeat"), [("cheetah", "run", 4), ("cartpole", "swingup", 8), ("humanoid", "walk", 1)]
)
def test_equals_dm_control(make, domain, task, repeat):
    """The same actions give the same observations, rewards and discounts."""
    env = make(domain, task, seed=5, frame_skip=repeat)
    direct = load(domain, task, 5)
    obs, _ = env.reset()
    assert np.array_equal(obs, flat(direct.reset().observation))
    for action in actions(env.action_space.shape, 30):
        obs, reward, terminated, truncated, info = env.step(action)
        want = 0.0
        for _ in range(repeat):
            time_step = direct.step(action)
            want += time_step.reward
        assert np.array_equal(obs, flat(time_step.observation))
        assert obs.dtype == np.float64
        assert reward == want
        assert info["discount"] == time_step.discount
        assert np.array_equal(info["internal_state"], direct.physics.get_state())
        assert not terminated
        assert not truncated


def test_pixels_equal_dm_controls(make):
    env = make("cheetah", "run", seed=5, from_pixels=True, frame_skip=2, visualize_reward=False)
    last = make("cheetah", "run", seed=5, from_pixels=True, frame_skip=2, channels_first=False)
    direct = load("cheetah", "run", 5)
    direct.reset()
    assert np.array_equal(env.reset()[0].transpose(1, 2, 0), last.reset()[0])
    for action in actions((6,), 5):
        obs, channels_last = env.step(action)[0], last.step(action)[0]
        direct.step(action)
        direct.step(action)
        assert np.array_equal(channels_last, direct.physics.render(84, 84, camera_id=0))
        assert np.array_equal(obs, channels_last.transpose(2, 0, 1))
    assert np.array_equal(env.render(height=40, width=60, camera_id=1), direct.physics.render(40, 60, camera_id=1))
    direct.close()


def test_cameras(make):
    env = make("quadruped", "walk", from_pixels=True, height=32, width=32)
    obs, _ = env.reset()
    physics = env.unwrapped.physics
    assert np.array_equal(obs.transpose(1, 2, 0), physics.render(32, 32, camera_id=2))
    assert np.array_equal(env.render(camera_id=0), physics.render(32, 32, camera_id=0))
    assert not np.array_equal(env.render(camera_id=0), env.render())
    obs, _ = make("quadruped", "walk", from_pixels=True, height=32, width=32, camera_id=0).reset()
    assert np.array_equal(obs.transpose(1, 2, 0), env.render(camera_id=0))


def play(env, count, reset_seed=None):
    """The observations and rewards of an episode as bytes."""
    record = [env.reset(seed=reset_seed)[0].tobytes()]
    for action in actions(env.action_space.shape, count):
        obs, reward, *_ = env.step(action)
        record.append(obs.tobytes() + np.float64(reward).tobytes())
    return record


def test_last_decision_of_an_episode(make):
    """1000 environment steps are 333 decisions of 3 and one of 1: rewards and observation end with the episode."""
    env, direct = make("cheetah", "run", seed=2, frame_skip=3), load("cheetah", "run", 2)
    env.reset()
    direct.reset()
    for action in actions((6,), 334):
        obs, reward, _, truncated, _ = env.step(action)
        want = 0.0
        for _ in range(3):
            time_step = direct.step(action)
            want += time_step.reward
            if time_step.last():
                break
        assert reward == want
    assert truncated
    assert np.array_equal(obs, flat(time_step.observation))


@pytest.mark.parametrize("flattened", [False, True])
def test_observations_that_nobody_sees_are_not_computed(make, monkeypatch, flattened):
    """One a decision, the last one; also where the episode ends among the repeats."""
    env = make(
        "cartpole", "swingup", seed=2, frame_skip=3, time_limit=0.08,
        environment_kwargs={"flat_observation": flattened},
    )  # fmt: skip
    direct = load("cartpole", "swingup", 2, time_limit=0.08)
    env.reset()
    direct.reset()
    calls = []
    kind = type(env.unwrapped._env.task)
    compute = kind.get_observation
    monkeypatch.setattr(kind, "get_observation", lambda *args: calls.append(1) or compute(*args))
    for decision, repeats in enumerate((3, 3, 2)):
        calls.clear()
        obs, _, _, truncated, _ = env.step(np.full(1, 0.5))
        assert len(calls) == 1
        for _ in range(repeats):
            time_step = direct.step(np.full(1, 0.5))
        assert np.array_equal(obs, flat(time_step.observation))
        assert truncated == time_step.last() == (decision == 2)


def test_pictures_larger_than_the_models_own_buffer(make):
    env = make("cartpole", "swingup", from_pixels=True, height=500, width=700)
    obs, _ = env.reset()
    small = make("cartpole", "swingup", visualize_reward=False)
    small.reset()
    assert small.render(height=64, width=64).shape == (64, 64, 3)
    assert np.array_equal(small.render(height=500, width=700), obs.transpose(1, 2, 0))
    assert np.array_equal(env.render(height=64, width=64), small.render(height=64, width=64))


def test_environment_kwargs(make):
    env = make("cartpole", "swingup", environment_kwargs={"flat_observation": True, "n_sub_steps": 2})
    env.reset()
    before = env.unwrapped.physics.time()
    env.step(np.zeros(1))
    assert env.unwrapped.physics.time() - before == pytest.approx(0.02)


@pytest.mark.parametrize(("domain", "task", "from_pixels"), [("reacher", "easy", True), ("lqr", "lqr_6_2", False)])
def test_same_seed_same_episodes(make, domain, task, from_pixels):
    settings = {"from_pixels": from_pixels, "height": 24, "width": 24}
    first, second, other = (make(domain, task, seed, **settings) for seed in (3, 3, 4))
    episodes = [[play(env, 5) for _ in range(2)] for env in (first, second, other)]
    assert episodes[0] == episodes[1]
    assert episodes[0] != episodes[2]
    assert episodes[0][0] != episodes[0][1]
    assert np.array_equal(*([env.action_space.sample() for _ in range(3)] for env in (first, second)))


def test_reset_with_a_seed(make):
    env = make("reacher", "easy", seed=3)
    play(env, 5)
    assert play(env, 5, reset_seed=11) == play(make("reacher", "easy", seed=8), 5, reset_seed=11)
    assert play(env, 5, reset_seed=11) != play(env, 5, reset_seed=12)


def test_pickled_environment_goes_on_alike(make):
    env = make("cheetah", "run", from_pixels=True, height=24, width=24, frame_skip=2)
    env.reset()
    for action in actions((6,), 3):
        env.step(action)
    copy = pickle.loads(pickle.dumps(env))
    for action in actions((6,), 4, seed=1):
        for ours, theirs in zip(env.step(action)[:4], copy.step(action)[:4], strict=True):
            assert np.array_equal(ours, theirs)
    assert np.array_equal(env.reset()[0], copy.reset()[0])
    assert (env.action_space.sample() == copy.action_space.sample()).all()
    copy.close()


@pytest.mark.parametrize(("repeat", "decisions"), [(8, 125), (3, 334)])
def test_time_limit(make, repeat, decisions):
    """1000 environment steps, rounded up to whole decisions; the task has not ended."""
    env = make("cartpole", "swingup", frame_skip=repeat)
    for _ in range(2):
        env.reset()
        flags = []
        while not flags or not any(flags[-1]):
            flags.append(env.step(np.zeros(1))[2:4])
        assert len(flags) == decisions
        assert flags[-1] == (False, True)


def test_shorter_limits(make):
    env = make("cartpole", "swingup", frame_skip=4, episode_length=10)
    env.reset()
    assert [env.step(np.zeros(1))[3] for _ in range(3)] == [False, False, True]
    env = make("cartpole", "swingup", time_limit=0.05)  # seconds of 0.01
    env.reset()
    assert [env.step(np.zeros(1))[3] for _ in range(5)] == [False] * 4 + [True]


def test_true_end(make, monkeypatch):
    """A task ends with discount 0: nothing that follows is worth anything."""
    env = make("lqr", "lqr_2_1", seed=1)
    env.reset()
    monkeypatch.setattr(env.unwrapped._env.task, "get_termination", lambda physics: 0.0)
    _, _, terminated, truncated, info = env.step(np.zeros(1))
    assert (terminated, truncated, info["discount"]) == (True, False, 0)


def test_actions_are_scaled_to_the_tasks_limits(make):
    env = make("quadruped", "walk")
    spec = env.unwrapped._env.action_spec()
    assert spec.maximum.max() > 1
    env.reset()
    for action, limit in ((np.ones(12), spec.maximum), (-np.ones(12), spec.minimum)):
        env.step(action)
        assert np.allclose(env.unwrapped.physics.control(), limit)
    env.step(np.zeros(12))
    assert np.allclose(env.unwrapped.physics.control(), (spec.maximum + spec.minimum) / 2)
    env = make("lqr", "lqr_2_1")  # without limits: as they are
    env.reset()
    env.step(np.array([0.25]))
    assert env.unwrapped.physics.control() == pytest.approx([0.25])


@pytest.mark.parametrize("action", [np.full(6, 1.5), np.full(6, np.nan), np.zeros(5)])
def test_impossible_actions_are_refused(make, action):
    env = make("cheetah", "run")
    env.reset()
    with pytest.raises(ValueError, match="actions are"):
        env.step(action)


def test_pixels_never_show_the_reward(make):
    settings = {"from_pixels": True, "height": 48, "width": 48}
    shown, hidden = (make("ball_in_cup", "catch", visualize_reward=flag, **settings) for flag in (True, False))
    assert play(shown, 5) == play(hidden, 5)


def test_configurations_do_not_mix(make):
    small = make("cheetah", "run", from_pixels=True, height=16, width=16, frame_skip=1)
    large = make("cheetah", "run", from_pixels=True, height=32, width=32, frame_skip=5)
    assert small.reset()[0].shape == (3, 16, 16)
    assert large.reset()[0].shape == (3, 32, 32)
    assert large.step(np.zeros(6))[1] != small.step(np.zeros(6))[1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dmc2gym.make("cheetah", "fly"), "no task cheetah fly"),
        (lambda: dmc2gym.make("cheetah", "run", frame_skip=0), "at least 1"),
        (lambda: dmc2gym.make("cheetah", "run").render(mode="human"), "render mode 'human'"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("from_pixels", [False, True])
@pytest.mark.filterwarnings("ignore")  # advice about unbounded states and frame rates
def test_gymnasiums_own_check(make, from_pixels):
    from gymnasium.utils.env_checker import check_env
    from shimmy import GymV26CompatibilityV0

    check_env(GymV26CompatibilityV0(env=make("cartpole", "swingup", from_pixels=from_pixels)))


def test_plain_pictures_have_the_render_size(make):
    env = make("cheetah", "run", from_pixels=True, height=16, width=20, render_size=32)
    assert env.reset()[0].shape == (3, 16, 20)
    assert env.render().shape == (32, 32, 3)
    assert env.render(height=8, width=12).shape == (8, 12, 3)
    assert np.array_equal(env.render(), env.render(height=32, width=32))
    assert make("cheetah", "run", height=16, width=20).render().shape == (16, 20, 3)


def test_renderer_of_any_environment(make):
    import gymnasium
    from gym.wrappers import ClipAction
    from shimmy import GymV26CompatibilityV0

    env = make("cartpole", "swingup")
    name, software = dmc2gym.renderer_of(env)
    assert name.endswith(f" through {os.environ['MUJOCO_GL']}")
    assert type(software) is bool
    shown = GymV26CompatibilityV0(env=ClipAction(env))
    for same in (env.unwrapped, ClipAction(env), shown, gymnasium.wrappers.TimeLimit(shown, 5)):
        assert dmc2gym.renderer_of(same) == (name, software)

    class Other(gymnasium.Env):
        renderer = "its own"

    assert dmc2gym.renderer_of(Other()) is None
    assert dmc2gym.renderer_of(gymnasium.wrappers.TimeLimit(Other(), 5)) is None


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
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import dmc2gym"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_import_chooses_a_renderer_before_dm_control():
    backend, imported = run_python(
        "import sys, os, dmc2gym; print(os.environ['MUJOCO_GL'], 'dm_control._render' in sys.modules)"
    ).split()
    assert imported == "False"
    assert backend in ("egl", "osmesa", "disabled")


STATES_THEN_PIXELS = """
import os, dmc2gym
print(os.environ["MUJOCO_GL"])
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
    variable = "__EGL_VENDOR_LIBRARY_DIRS"
    backend, states, pixels = run_python(STATES_THEN_PIXELS, **{variable: "/nonexistent"}).splitlines()
    assert states == "works "
    if backend == "osmesa":
        assert pixels.endswith("through osmesa")
    else:
        assert backend == "disabled"
        assert f"{variable}=/nonexistent is set" in pixels


@pytest.mark.parametrize(
    "chosen",
    [
        {"MUJOCO_EGL_DEVICE_ID": "999"},
        {"PYOPENGL_PLATFORM": "glx"},
        {"MUJOCO_GL": "disabled"},
        {"MUJOCO_GL": "glfw"},
        {"MESA_GL_VERSION_OVERRIDE": "1.0"},
    ],
)
def test_states_work_and_pixels_name_the_variable_that_the_user_set(chosen):
    _, states, pixels = run_python(STATES_THEN_PIXELS, **chosen).splitlines()
    assert states == "works "
    (variable,) = chosen
    assert f"; {variable}={chosen[variable]} is set: unset it" in pixels
    assert "apt-get" not in pixels


@pytest.mark.parametrize(
    ("device", "visible", "works", "chosen"),
    [
        ("cuda:1", None, {"1"}, "1"),
        ("cuda:1", "", {"1"}, "1"),
        ("cuda:1", "2,5", {"1", "2", "5"}, "5"),
        ("cuda", "3", {"3"}, "3"),
        ("cuda", "3", set(), None),  # a container hides the others
        ("cuda:1", "GPU-8a,GPU-9b", {"0", "1"}, None),
        ("cuda:7", "2,5", {"7"}, None),
        ("cuda", None, {"0"}, None),
        ("cpu", "3", {"3"}, None),
    ],
)
def test_the_renderer_follows_the_device(monkeypatch, device, visible, works, chosen):
    """With fakes: which GPUs there are, and on which of them EGL draws."""
    environ = {"MUJOCO_GL": "egl"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(rendering, "_works", lambda _, **variables: variables["MUJOCO_EGL_DEVICE_ID"] in works)
    dmc2gym.render_on(device)
    assert environ.get("MUJOCO_EGL_DEVICE_ID") == chosen
    assert "MUJOCO_EGL_DEVICE_ID" not in str(rendering.renderer_error(RuntimeError("broken")))
    environ["MUJOCO_EGL_DEVICE_ID"] = "4"  # the user's own
    dmc2gym.render_on(device)
    assert environ["MUJOCO_EGL_DEVICE_ID"] == "4"
    assert "MUJOCO_EGL_DEVICE_ID=4 is set" in str(rendering.renderer_error(RuntimeError("broken")))


@pytest.mark.parametrize(
    "chosen",
    [
        {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "abc"},
        {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "glx"},
        {"MUJOCO_GL": "vulkan"},
        {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent"},
    ],
)
def test_a_choice_that_does_not_work_is_refused_by_name(chosen):
    for line in run_python(STATES_THEN_PIXELS, **chosen).splitlines()[1:]:
        assert line.startswith("no usable renderer (")
        assert all(f"{variable}={value}" in line for variable, value in chosen.items())
        assert "apt-get" not in line


def test_what_was_chosen_here_is_not_said_to_be_the_users():
    program = (
        "import os, subprocess, sys, dmc2gym\n"
        "from dmc2gym.rendering import renderer_error\n"
        "print(renderer_error(RuntimeError('why')), flush=True)\n"
        "if len(sys.argv) == 1: subprocess.run([sys.executable, '-c', sys.orig_argv[2], 'below'], check=True)"
    )
    lines = run_python(program).splitlines()
    assert len(lines) == 2  # here, and in a process below
    assert all(line.startswith("no usable renderer (why); on Debian") for line in lines)


def test_a_terrain_is_drawn_as_it_was_made(make):
    """A renderer that starts after a reset shows the terrain of that reset, and later ones theirs."""
    late, early = make("quadruped", "escape"), make("quadruped", "escape", from_pixels=True)
    for seed in (3, 4):
        late.reset(seed=seed)
        assert np.array_equal(late.render(), early.reset(seed=seed)[0].transpose(1, 2, 0))


@pytest.mark.parametrize(("from_pixels", "frame_skip"), [(False, 1), (False, 4), (True, 4)])
def test_a_simulation_that_diverges_ends_the_episode(make, from_pixels, frame_skip):
    env = make("cheetah", "run", from_pixels=from_pixels, frame_skip=frame_skip)
    env.reset(seed=1)
    before, *_ = env.step(np.ones(6, np.float32))
    env.unwrapped.physics.data.qvel[:] = 1e12
    obs, reward, terminated, truncated, info = env.step(np.ones(6, np.float32))
    assert np.array_equal(obs, before)
    assert (reward, terminated, truncated, info["discount"]) == (0.0, True, False, 0.0)
    assert "mjWARN_BADQ" in info["physics_error"]
    env.reset(seed=2)
    again = make("cheetah", "run", from_pixels=from_pixels, frame_skip=frame_skip)
    again.reset(seed=2)
    for action in actions((6,), 3):
        got, want = env.step(action), again.step(action)
        assert np.array_equal(got[0], want[0])
        assert "physics_error" not in got[4]


@pytest.mark.parametrize(("failures", "works"), [(1, True), (9, True), (10, False)])
def test_a_simulation_that_diverges_at_a_reset_is_reset_again(make, failures, works):
    from dm_control.rl.control import PhysicsError

    env = make("cheetah", "run")
    task, left = env.unwrapped._env.task, [failures]
    begin = task.initialize_episode

    def diverge(physics):
        begin(physics)
        left[0] -= 1
        if left[0] >= 0:
            raise PhysicsError("invalid")

    task.initialize_episode = diverge
    if works:
        assert env.reset(seed=1)[0].shape == (17,)
    else:
        with pytest.raises(PhysicsError):
            env.reset(seed=1)


@pytest.mark.parametrize(("backend", "ending"), [("egl", ""), ("egl", "raise SystemExit(0)"), ("osmesa", "")])
def test_programs_end_silently(backend, ending):
    """Whether an environment was closed, closed twice, deleted or left open."""
    program = (
        "import dmc2gym\n"
        "try:\n"
        "    envs = [dmc2gym.make('cartpole', 'swingup', from_pixels=True, height=8, width=8) for _ in range(3)]\n"
        "    drawn = [env.reset() for env in envs]\n"
        "except ValueError: print('no such renderer here'); raise SystemExit\n"
        "envs[0].close(); envs[0].close(); del envs[1]; print('drawn')\n" + ending
    )
    assert run_python(program, MUJOCO_GL=backend)  # and nothing on stderr
