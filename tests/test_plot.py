"""Curves and tables show what the logs say."""

from __future__ import annotations

import json

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
from folders import contents

import plot
from support.published import METHODS


def make_run(folder, returns, method="sac_ae", task=("cheetah", "run"), seed=1, every=10_000, **flags):
    """A work_dir with evaluations every `every` decisions, of four environment steps each unless told otherwise."""
    folder.mkdir(parents=True)
    args = {"domain_name": task[0], "task_name": task[1], "seed": seed, "action_repeat": 4}
    args |= {"encoder_type": METHODS[method].encoder_type, "decoder_type": METHODS[method].decoder_type} | flags
    (folder / "args.json").write_text(json.dumps(args))
    records = (
        {"episode_reward": value, "environment_steps": index * every * args["action_repeat"], "step": index * every}
        for index, value in enumerate(returns)
    )
    (folder / "eval.log").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def draw(tmp_path, *folders):
    """Draws the runs in `tmp_path/runs`, or in these folders. Returns scores.csv, as text."""
    plot.main([*map(str, folders or [tmp_path / "runs"]), "--out", str(tmp_path / "out")])
    return pd.read_csv(tmp_path / "out" / "scores.csv", dtype=str, keep_default_na=False)


def row_of(scores, *key):
    """Seeds, return, deviation, interval and published score of a method on a task at a budget."""
    return scores.set_index(["method", "task", "environment steps"]).loc[key].tolist()


def test_table(tmp_path, capsys):
    """An interquartile mean needs four scores, and the same number of seeds for each task."""
    walker = ("walker", "walk")
    for seed, value in enumerate([100, 300], start=1):
        make_run(tmp_path / "runs" / "deep" / f"cheetah{seed}", [0, 10, value, 400], seed=seed)
    make_run(tmp_path / "runs" / "short", [0, 10], seed=3)
    make_run(tmp_path / "runs" / "state", [0, 700, 710, 720], "sac_state")
    make_run(tmp_path / "runs" / "walker", [0, 10, 100, 400], task=walker)
    scores = draw(tmp_path)
    assert row_of(scores, "SAC+AE:pixel", "cheetah_run", "100000") == [
        "2",
        "200.0",
        "141.4",
        "100.0 to 300.0",
        "240 ± 38",
    ]
    assert row_of(scores, "SAC+AE:pixel", "cheetah_run", "500000")[:4] == ["0", "not reached", "", ""]
    assert row_of(scores, "SAC:state", "cheetah_run", "100000")[:4] == ["1", "710.0", "", ""]
    assert not scores["task"].str.contains("interquartile").any()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "scores.md").read_text()
    assert printed.splitlines()[2].startswith("| SAC+AE:pixel | cheetah_run | 100000 | 2 | 200.0 |")

    make_run(tmp_path / "runs" / "walker2", [0, 10, 500, 400], task=walker, seed=2)
    row = row_of(draw(tmp_path), "SAC+AE:pixel", "interquartile mean of 2 tasks", "100000")
    assert (row[0], row[1], row[2], row[4]) == ("2", "200.0", "", "not published")
    make_run(tmp_path / "runs" / "walker3", [0, 10, 500, 400], task=walker, seed=3)
    assert not draw(tmp_path)["task"].str.contains("interquartile").any()


@pytest.mark.parametrize(
    ("every", "count", "budget", "score_is_from"),
    [
        (40_000, 4, 100_000, 80_000),  # it went on
        (10_000, 10, 100_000, 90_000),
        (10_000, 9, 100_000, None),
        (80_000, 7, 500_000, 480_000),  # as in the DrQ paper
        (120_000, 4, 100_000, None),  # only an untrained policy was evaluated within the budget
    ],
)
def test_a_score_is_the_last_within_the_budget_of_a_run_that_reached_it(tmp_path, every, count, budget, score_is_from):
    """Whatever its flags said in the end: --eval_freq may change at a resume."""
    returns = [index * every for index in range(count)]
    runs = plot.read_run(make_run(tmp_path / "a", returns, every=every // 4, eval_freq=1_000_000))
    assert plot.scores_at(runs, budget).tolist() == ([] if score_is_from is None else [score_is_from])


def test_evaluations_in_long_form(tmp_path):
    """Each with the commit of the part of the run that made it; what a log does not say is empty."""
    run = make_run(tmp_path / "runs" / "a", [1, 2, 3])
    (run / "eval.log").write_text((run / "eval.log").read_text().replace("}", ', "episode_reward_std": 0.5}', 1))
    starts = [{"step": 0, "commit": "old"}, {"step": 15_000, "commit": "new"}]
    (run / "starts.log").write_text("".join(json.dumps(start) + "\n" for start in starts))
    make_run(tmp_path / "runs" / "b", [4], seed=2)
    draw(tmp_path)
    assert (tmp_path / "out" / "evaluations.csv").read_text().splitlines()[1:] == [
        "cheetah_run,SAC+AE:pixel,1,0,1.0,0.5,old",
        "cheetah_run,SAC+AE:pixel,1,40000,2.0,nan,old",
        "cheetah_run,SAC+AE:pixel,1,80000,3.0,nan,new",
        "cheetah_run,SAC+AE:pixel,2,0,4.0,nan,",
    ]


def test_estimates():
    """The interval agrees with the formula: the mean's deviation is that of the values over the root of N."""
    values = np.random.default_rng(1).normal(500, 100, 400)
    mean, low, high = plot.estimate([values])
    assert mean == pytest.approx(values.mean())
    assert [mean - low, high - mean] == pytest.approx(2 * [1.96 * values.std() / 20], abs=1)
    # An interquartile mean leaves out the outer quarters.
    mean, low, high = plot.estimate([np.array([0.0, 10.0, 20.0, 1e6]), np.array([30.0, 40.0, 50.0, 60.0])])
    assert mean == pytest.approx((20 + 30 + 40 + 50) / 4)
    assert low < mean < high
    # Each task's seeds are resampled by themselves. If they agree, the interval has no width.
    assert plot.estimate([np.full(5, 100.0), np.full(5, 300.0)]) == pytest.approx((200, 200, 200))


def test_curve_of_runs_of_different_lengths_and_grids(tmp_path):
    runs = [
        plot.read_run(make_run(tmp_path / "a", [0, 100, 200])),
        plot.read_run(make_run(tmp_path / "b", [100, 200, 300], seed=2, every=5000)),
    ]
    means = plot.curve(pd.concat(runs))
    assert means.index.tolist() == [0, 20_000, 40_000]
    assert means["mean"].tolist() == [50, 125, 200]
    assert means.iloc[0].tolist() == [50, 0, 100]
    # A run that has just begun does not change the mean of the others.
    short = plot.read_run(make_run(tmp_path / "c", [1000], seed=3))
    everything = pd.concat([*runs, short], ignore_index=True)
    (line,) = plot.notes(everything)
    assert line.startswith(f"note: {tmp_path / 'c'} is not in the curve of the mean")
    assert plot.long_enough(everything)["run"].unique().tolist() == [tmp_path / "a", tmp_path / "b"]


def test_notes(tmp_path, capsys):
    """Runs that differ in what makes the method, or have the same seed, are reported; machine and saving are free."""
    make_run(tmp_path / "runs" / "a", [0, 10, 100, 0], device="cpu", save_tb=True, num_train_steps=5, hidden_dim=8)
    more = {"hidden_dim": 8, "actor_log_std_max": 2}  # a flag that is newer than a
    make_run(tmp_path / "runs" / "b", [0, 10, 300, 0], seed=2, device="cuda", save_tb=False, compile=True, **more)
    draw(tmp_path)
    assert capsys.readouterr().err == ""
    make_run(tmp_path / "runs" / "c", [0, 10, 100, 0], seed=2, action_repeat=8, hidden_dim=16, num_filters=8)
    draw(tmp_path)
    note = "note: the runs of SAC+AE:pixel on cheetah_run are averaged though"
    assert capsys.readouterr().err.splitlines() == [
        f"{note} they differ in --action_repeat, --hidden_dim, --num_filters",
        f"{note} some have the same seed",
    ]


def test_another_agent_or_encoder_is_a_method_of_its_own(tmp_path, capsys):
    runs = {"a": {}, "b": {"agent": "sac_ae", "freeze_encoder": False}, "c": {"agent": "drq"}}
    runs["d"] = {"critic_trains_encoder": False, "decoder_update_freq": 10}
    for name, more in runs.items():
        make_run(tmp_path / "runs" / name, [0, 10, 100, 0], seed=ord(name), **more)
    seeds = draw(tmp_path)[:3].set_index("method")["seeds"].to_dict()
    variant = "no-critic_trains_encoder, decoder_update_freq 10"
    assert seeds == {"SAC+AE:pixel": "2", "SAC+AE:pixel (drq)": "1", f"SAC+AE:pixel ({variant})": "1"}
    assert capsys.readouterr().err == ""
    for index in range(20):
        make_run(tmp_path / "runs" / f"more {index}", [0, 10, 100, 0], decoder_update_freq=20 + index, beta=0.5)
    figure = plot.draw(plot.read_runs([tmp_path / "runs"]), plot.read_published(plot.PUBLISHED))
    lines = [line for line in figure.axes[0].get_lines() if ", here (" in line.get_label()]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 23
    figure.savefig(tmp_path / "figure.png", dpi=100)
    box = figure.axes[0].get_window_extent()
    assert box.height > 150
    assert figure.legends[0].get_window_extent().y1 < box.y0


DAMAGES = {
    "empty": b"\n",
    "no text": b"\xff\xfe\n",
    "list": b"[1]\n",
    "order": b"".join(b'{"episode_reward": 1, "environment_steps": %d}\n' % step for step in (0, 8, 4)),
    "no return": b'{"episode_reward": NaN, "environment_steps": 0}\n',
    "lists": b'{"episode_reward": [1], "environment_steps": 0}\n',
}


@pytest.mark.parametrize("file", ["eval.log", "args.json", "starts.log"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_runs_are_left_out(tmp_path, capsys, file, damage):
    """Each gets one line on stderr, which names the file. The other runs are drawn."""
    make_run(tmp_path / "runs" / "good", [0, 10, 100, 0])
    bad = make_run(tmp_path / "runs" / "bad", [0, 10, 100, 0], seed=2)
    (bad / file).write_bytes(DAMAGES[damage])
    runs = plot.read_runs([tmp_path / "runs"])
    assert runs["run"].unique().tolist() == [tmp_path / "runs" / "good"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{bad} is left out: {bad / file} is damaged")


def test_unfinished_runs_and_folders_without_runs(tmp_path, capsys):
    """The last line may be half written. A run without an evaluation is left out, in a line."""
    run, new, newer = (make_run(tmp_path / name, values) for name, values in (("a", [0, 100]), ("b", []), ("c", [])))
    with (run / "eval.log").open("a") as file:
        file.write('{"episode_rew')
    (newer / "eval.log").unlink()
    (tmp_path / "empty").mkdir()
    nothing = [tmp_path / "nowhere", run / "eval.log", tmp_path / "empty"]
    assert plot.read_runs([*nothing, tmp_path])["return"].tolist() == [0, 100]
    *lines, line, last = capsys.readouterr().err.splitlines()
    assert lines == [f"{folder}: there is no run, nothing with an args.json" for folder in nothing]
    assert line.startswith(f"{new} is left out: ")
    assert last == f"{newer} is left out: {newer / 'eval.log'} is missing"


def test_runs_of_the_authors_script(tmp_path):
    """Their lines have steps only. Each is `action_repeat` environment steps."""
    run = make_run(tmp_path / "run", [0, 10, 100, 400])
    ours = plot.read_run(run)
    lines = [json.loads(line) for line in (run / "eval.log").read_text().splitlines()]
    records = ({"episode": 3.0, "episode_reward": line["episode_reward"], "step": line["step"]} for line in lines)
    (run / "eval.log").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert plot.read_run(run).equals(ours)


def test_links_are_followed_and_each_run_counts_once(tmp_path, capsys):
    """To a run, to a folder of runs, to the files of a run, and in circles. A run that was replaced must be named."""
    run = make_run(tmp_path / "disk" / "runs" / "a", [0, 10])
    parts = make_run(tmp_path / "disk" / "parts", [0, 20], seed=2)
    old = make_run(run.parent / "a.20260101-235959", [0, 30])
    shown = tmp_path / "shown"
    (shown / "files").mkdir(parents=True)
    for name in ("args.json", "eval.log"):
        (shown / "files" / name).symlink_to(parts / name)
    for name, target in {"run": run, "folder": run.parent, "itself": shown / "itself"}.items():
        (shown / name).symlink_to(target)
    for circle in ("circle", "another", "and another"):  # each of which leads to all others
        (shown / circle).symlink_to(shown)
    for folders in ([shown], [shown, shown, run]):
        assert sorted(plot.read_runs(folders)["return"]) == [0, 0, 10, 20]
    assert sorted(plot.read_runs([run, old])["return"]) == [0, 0, 10, 30]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "flags", "words"),
    [
        ("empty", [], "there is no run to draw"),
        ("run", ["--out", "run/eval.log"], "File exists"),
        ("run", ["--out", "taken"], "Is a directory"),
        ("run", ["--published", "run/eval.log"], "eval.log is damaged"),
    ],
)
def test_refusals(tmp_path, capsys, monkeypatch, folders, flags, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [0, 1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken" / "curves.png").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit_:
        plot.main([folders, *flags])
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "plots").exists()
    assert not list((tmp_path / "taken").glob(".*"))


def test_pictures(tmp_path):
    """Each task has a panel. The legend names everything once, and a single seed as such."""
    tasks = [("cheetah", "run"), ("walker", "walk"), ("finger", "spin"), ("reacher", "easy")]
    for task in tasks:
        for method, seed in (("sac_ae", 1), ("sac_ae", 2), ("sac_pixel", 1), ("sac_state", 1), ("sac_state", 2)):
            make_run(tmp_path / "runs" / f"{task[0]}_{method}_{seed}", [0, 10, 100], method, task, seed)
    make_run(tmp_path / "runs" / "short", [0], "sac_pixel", tasks[0], seed=2)  # it is not in the mean
    figure = plot.draw(plot.read_runs([tmp_path / "runs"]), plot.read_published(plot.PUBLISHED))
    assert [axis.get_title() for axis in figure.axes] == ["cheetah run", "finger spin", "reacher easy", "walker walk"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == len(set(names))
    here = ["SAC+AE:pixel, here (mean, 95 %)", "SAC:pixel, here (one seed)", "SAC:state, here (mean, 95 %)"]
    assert [name for name in names if "here" in name] == here
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines[here[2]].get_xydata().tolist() == [[0, 0], [40_000, 10], [80_000, 100]]
    drq = {bar.get_label(): bar.lines[0].get_ydata().tolist() for bar in figure.axes[0].containers}
    assert drq == {
        f"{name}, DrQ paper's table": [score] for name, score in {"SAC:state": 228, "SAC+AE:pixel": 240}.items()
    }
    assert "SAC:state, published figure" not in lines
    assert lines["SAC:pixel, published figure"].get_xdata().tolist() == [100_000]


def test_files_appear_whole_and_are_the_same_for_the_same_runs(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "a", [1, 1, 1])
    # Of a run without a step in common with the other, because its early lines are gone.
    late = make_run(tmp_path / "runs" / "b", [1] * 5, seed=2, every=7000)
    (late / "eval.log").write_text((late / "eval.log").read_text().splitlines()[-1] + "\n")
    draw(tmp_path)
    before = contents(tmp_path / "out")
    assert before.keys() == {"curves.png", "curves.svg", "scores.md", "scores.csv", "evaluations.csv"}
    assert iio.imread(before["curves.png"]).shape[2] == 4
    (tmp_path / "out" / "scores.md").write_text("of another program")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    draw(tmp_path)
    assert contents(tmp_path / "out") == before | {"notes.txt": b"mine"}

    to_csv = pd.DataFrame.to_csv

    def interrupted(*args, **kwargs):
        to_csv(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", interrupted)
    make_run(tmp_path / "runs" / "c", [5, 6], seed=3)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path)
    assert contents(tmp_path / "out") == before | {"notes.txt": b"mine"}
