"""Curves and tables show what the logs say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest

import plot


def make_run(folder, returns, method="SAC+AE:pixel", task=("cheetah", "run"), seed=1, every=10_000, repeat=4):
    """A work_dir with evaluations every `every` decisions."""
    encoder, decoder = next(types for types, name in plot.METHODS.items() if name == method)
    folder.mkdir(parents=True)
    args = {
        "domain_name": task[0], "task_name": task[1], "encoder_type": encoder, "decoder_type": decoder,
        "seed": seed, "eval_freq": every, "action_repeat": repeat,
    }  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args))
    records = (
        {"episode_reward": value, "environment_steps": index * every * repeat, "step": index * every}
        for index, value in enumerate(returns)
    )
    (folder / "eval.log").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def rows_of(out):
    with (out / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table(tmp_path, capsys):
    """With evaluations every 40k steps, the score at 100k is from 80k. A run that ends before has no score."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_run(runs / "a", [0, 10, 100, 400])
    make_run(runs / "deep" / "b", [0, 10, 300], seed=2)  # its next evaluation would come after the budget
    make_run(runs / "c", [0, 10], seed=3)
    make_run(runs / "d", [0, 700, 710], "SAC:state", seed=1)
    assert plot.main([str(runs), "--out", str(out)]) == 0
    rows = {(row["method"], row["task"], row["environment steps"]): row for row in rows_of(out)}
    row = rows["SAC+AE:pixel", "cheetah_run", "100000"]
    assert (row["seeds"], row["return"], row["deviation"]) == ("2", "200.0", "141.4")
    assert row["95 %"] == "100.0 to 300.0"
    assert row["published"] == "240 ± 38"
    assert rows["SAC+AE:pixel", "cheetah_run", "500000"]["return"] == "not reached"
    assert rows["SAC:state", "cheetah_run", "100000"]["seeds"] == "1"
    assert rows["SAC:state", "cheetah_run", "100000"]["95 %"] == ""
    with (out / "evaluations.csv").open(newline="") as file:
        assert [row["return"] for row in csv.DictReader(file) if row["seed"] == "2"] == ["0.0", "10.0", "300.0"]
    printed = capsys.readouterr().out
    assert printed == (out / "scores.md").read_text()
    assert printed.splitlines()[2].startswith("| SAC+AE:pixel | cheetah_run | 100000 | 2 | 200.0 |")


def test_evaluations_in_long_form(tmp_path):
    """Each with the commit of the part of the run that made it; what a log does not say is empty."""
    run = make_run(tmp_path / "runs" / "a", [1, 2, 3])
    (run / "eval.log").write_text((run / "eval.log").read_text().replace("}", ', "episode_reward_std": 0.5}', 1))
    starts = [{"step": 0, "commit": "old"}, {"step": 15_000, "commit": "new"}]
    (run / "starts.log").write_text("".join(json.dumps(start) + "\n" for start in starts))
    make_run(tmp_path / "runs" / "b", [4], seed=2)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "evaluations.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[2:] for row in rows] == [
        ["1", "0", "1.0", "0.5", "old"],
        ["1", "40000", "2.0", "nan", "old"],
        ["1", "80000", "3.0", "nan", "new"],
        ["2", "0", "4.0", "nan", ""],
    ]


def test_estimates():
    """The interval agrees with the formula: the mean's deviation is that of the values over the root of N."""
    rng = np.random.default_rng(1)
    values = rng.normal(500, 100, 400)
    mean, low, high = plot.estimate([values])
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=1)
    assert high == pytest.approx(values.mean() + half, abs=1)
    assert plot.estimate([np.array([7.5])]) == (7.5, 7.5, 7.5)  # one seed


def test_interquartile_mean_leaves_out_the_outer_quarters_and_keeps_tasks_apart():
    values = [np.array([0.0, 10.0, 20.0, 1e6]), np.array([30.0, 40.0, 50.0, 60.0])]
    mean, low, high = plot.estimate(values)
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
    runs.append(plot.read_run(make_run(tmp_path / "c", [1000], seed=3)))
    (line,) = plot.notes(pd.concat(runs))
    assert line.startswith(f"note: {tmp_path / 'c'} is not in the curve of the mean")
    assert plot.curve(pd.concat(runs))["mean"].tolist() == [50, 125, 200]


def test_an_unfinished_line_is_skipped(tmp_path):
    folder = make_run(tmp_path / "a", [0, 100])
    with (folder / "eval.log").open("a") as file:
        file.write('{"episode_rew')
    assert plot.read_run(folder)["return"].tolist() == [0, 100]


def test_notes(tmp_path, capsys):
    """A run that is found twice counts once. Different settings and equal seeds are reported."""
    runs = [make_run(tmp_path / "runs" / "a", [0, 10, 100]), make_run(tmp_path / "runs" / "b", [0, 10, 300], seed=2)]
    assert plot.main([*map(str, runs), str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert rows_of(tmp_path / "out")[0]["seeds"] == "2"
    assert capsys.readouterr().err == ""
    make_run(tmp_path / "runs" / "c", [0, 10, 100], seed=2, repeat=8)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        "note: the runs of SAC+AE:pixel on cheetah_run are averaged though they differ in --action_repeat\n"
        "note: the runs of SAC+AE:pixel on cheetah_run are averaged though some have the same seed\n"
    )


def test_table_has_interquartile_means(tmp_path):
    """They need four scores, and the same number of seeds for each task."""
    for task in (("cheetah", "run"), ("walker", "walk")):
        make_run(tmp_path / "runs" / f"{task[0]}1", [0, 10, 100], task=task)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert not any("interquartile" in row["task"] for row in rows_of(tmp_path / "out"))
    make_run(tmp_path / "runs" / "cheetah2", [0, 10, 500], seed=2)
    make_run(tmp_path / "runs" / "cheetah3", [0, 10, 500], seed=3)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert not any("interquartile" in row["task"] for row in rows_of(tmp_path / "out"))
    for seed in (2, 3):
        make_run(tmp_path / "runs" / f"walker{seed}", [0, 10, 400], task=("walker", "walk"), seed=seed)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    (row,) = [row for row in rows_of(tmp_path / "out") if "interquartile" in row["task"]]
    assert (row["seeds"], row["return"]) == ("3", "350.0")
    make_run(tmp_path / "runs" / "finger1", [0, 10], task=("finger", "spin"))  # it ends before the budget
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert not any("interquartile" in row["task"] for row in rows_of(tmp_path / "out"))


DAMAGES = {
    "no log": lambda folder: (folder / "eval.log").unlink(),
    "empty": lambda folder: (folder / "eval.log").write_text(""),
    "half a line": lambda folder: (folder / "eval.log").write_text('{"episode_rew'),
    "other fields": lambda folder: (folder / "eval.log").write_text('{"reward": 3}\n'),
    "text": lambda folder: (folder / "eval.log").write_bytes(b"\xff\xfe"),
    "list": lambda folder: (folder / "eval.log").write_text("[1]\n"),
    "list and fields": lambda folder: (folder / "eval.log").write_text(
        '[1]\n{"episode_reward": 1, "environment_steps": 0}\n'
    ),
    "order": lambda folder: (folder / "eval.log").write_text(
        "".join(f'{{"episode_reward": 1, "environment_steps": {step}}}\n' for step in (0, 8, 4))
    ),
    "no return": lambda folder: (folder / "eval.log").write_text('{"episode_reward": NaN, "environment_steps": 0}\n'),
    "no steps": lambda folder: (folder / "eval.log").write_text(
        '{"episode_reward": 1, "environment_steps": Infinity}\n'
    ),
    "huge": lambda folder: (folder / "eval.log").write_text(
        f'{{"episode_reward": 1{"0" * 400}, "environment_steps": 0}}\n'
    ),
    "deep": lambda folder: (folder / "eval.log").write_text("[" * 100_000 + "\n"),
    "lists": lambda folder: (folder / "eval.log").write_text('{"episode_reward": [1], "environment_steps": 0}\n'),
    "args": lambda folder: (folder / "args.json").write_text("{"),
    "other args": lambda folder: (folder / "args.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_logs_are_left_out(tmp_path, capsys, damage):
    """Each gets one line on stderr. The other runs are drawn."""
    make_run(tmp_path / "runs" / "good", [0, 10, 100])
    bad = make_run(tmp_path / "runs" / "bad", [0, 10, 100], seed=2)
    DAMAGES[damage](bad)
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"{bad} is left out")
    assert error.count("\n") == 1
    assert rows_of(tmp_path / "out")[0]["seeds"] == "1"


def test_nothing_to_draw(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert "there is no run to draw" in capsys.readouterr().err
    make_run(tmp_path / "runs", [0, 1])
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--out", str(tmp_path / "runs" / "eval.log")])
    assert "cannot be written: File exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--published", str(tmp_path / "runs" / "eval.log")])
    assert "cannot be read as published scores" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pictures(tmp_path):
    """Each task has a panel. The legend names everything once."""
    tasks = [("cheetah", "run"), ("walker", "walk"), ("finger", "spin"), ("reacher", "easy")]
    for task in tasks:
        for seed in (1, 2):
            for method in plot.METHODS.values():
                make_run(tmp_path / "runs" / f"{task[0]}_{method}_{seed}", [0, 10, 100], method, task, seed)
    runs = plot.read_runs([tmp_path / "runs"])
    assert runs["run"].nunique() == 24
    figure = plot.draw(runs, plot.read_published(plot.PUBLISHED))
    assert [axis.get_title() for axis in figure.axes] == ["cheetah run", "finger spin", "reacher easy", "walker walk"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels))
    assert {f"{method}, here (mean, 95 %)" for method in plot.METHODS.values()} < set(labels)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["SAC:state, here (mean, 95 %)"].get_xydata().tolist() == [[0, 0], [40_000, 10], [80_000, 100]]
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert iio.imread(tmp_path / "out" / "curves.png").shape[2] == 4
    svg = (tmp_path / "out" / "curves.svg").read_text()
    assert "<svg" in svg[:500]
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "curves.svg").read_text() == svg


def test_published_scores_are_those_of_the_papers(tmp_path):
    """The DrQ paper has six tasks at both budgets."""
    published = plot.read_published(plot.PUBLISHED)
    drq = published[published["source"].str.contains("DrQ")]
    table = drq.set_index(["task", "method", "environment_steps"])["std"]
    tasks = published["task"].unique()
    assert len(tasks) == 6
    for task in tasks:
        for budget in plot.BUDGETS:
            assert table[task, "SAC+AE:pixel", budget] > 0


def test_runs_of_the_authors_script(tmp_path, capsys):
    """Their lines have steps only. Each is `action_repeat` environment steps."""
    run = make_run(tmp_path / "runs" / "a", [0, 10, 100, 400])
    lines = [json.loads(line) for line in (run / "eval.log").read_text().splitlines()]
    theirs = tmp_path / "runs" / "theirs"
    theirs.mkdir()
    flags = json.loads((run / "args.json").read_text()) | {"seed": 2, "agent": "sac_ae", "save_tb": False}
    (theirs / "args.json").write_text(json.dumps(flags, sort_keys=True, indent=4))
    records = ({"episode": 3.0, "episode_reward": line["episode_reward"], "step": line["step"]} for line in lines)
    (theirs / "eval.log").write_text("".join(json.dumps(record) + "\n" for record in records))
    ours, read = plot.read_run(run), plot.read_run(theirs)
    for name in ("environment steps", "return", "interval", "end"):
        assert read[name].tolist() == ours[name].tolist()
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    assert rows_of(tmp_path / "out")[0]["seeds"] == "2"


def test_folders_without_runs(tmp_path, capsys):
    run = make_run(tmp_path / "run", [0, 1])
    (tmp_path / "empty").mkdir()
    folders = [tmp_path / "nowhere", run / "eval.log", tmp_path / "empty"]
    assert plot.main([*map(str, folders), str(run), "--out", str(tmp_path / "out")]) == 0
    reasons = [*["the folder does not exist"] * 2, "no run there, nothing with an args.json"]
    expected = [f"{folder}: {reason}" for folder, reason in zip(folders, reasons, strict=True)]
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("name", plot.FILES)
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_files_of_others_are_not_overwritten(tmp_path, capsys, name, kind):
    """One line, and nothing changes, if a file is there that plot.py has not written."""
    run, out = make_run(tmp_path / "run", [0, 1]), tmp_path / "out"
    out.mkdir()
    if kind == "link":
        (out / name).symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        (out / name).mkdir()
    else:
        (out / name).write_text("mine")
    before = {path.name: path.is_file() and path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(run), "--out", str(out)])
    assert exit_.value.code == 2
    assert f"files that plot.py has not written, or that were changed since ({name})" in capsys.readouterr().err
    assert {path.name: path.is_file() and path.read_bytes() for path in out.iterdir()} == before


def test_a_file_that_the_user_has_changed_is_not_overwritten(tmp_path, capsys):
    run, out = make_run(tmp_path / "run", [0, 1]), tmp_path / "out"
    assert [plot.main([str(run), "--out", str(out)]) for _ in range(2)] == [0, 0]
    (out / "scores.md").write_text("mine")
    with pytest.raises(SystemExit):
        plot.main([str(run), "--out", str(out)])
    assert "(scores.md)" in capsys.readouterr().err
    assert (out / "scores.md").read_text() == "mine"


def test_runs_without_a_common_step_are_drawn(tmp_path):
    """The early lines of one are gone."""
    for seed, steps in ((1, (0, 50, 100)), (2, (150, 200))):
        folder = make_run(tmp_path / "runs" / str(seed), [1.0] * len(steps), seed=seed)
        lines = [json.dumps({"step": step, "episode_reward": 1.0}) + "\n" for step in steps]
        (folder / "eval.log").write_text("".join(lines))
    assert plot.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "curves.png").exists()


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_a_drawing_that_was_interrupted_while_files_were_replaced_is_drawn_again(tmp_path, monkeypatch, begun, count):
    run, out, replaced = make_run(tmp_path / "run", [0, 1]), tmp_path / "out", []
    if begun:
        assert plot.main([str(run), "--out", str(out)]) == 0
        make_run(tmp_path / "run" / "more", [5, 6], seed=2)

    def replace(path, target, replace=Path.replace):
        replaced.append(target)
        if len(replaced) == count:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        plot.main([str(run), "--out", str(out)])
    assert plot.main([str(run), "--out", str(out)]) == 0


def test_a_list_of_files_that_is_damaged(tmp_path, capsys):
    run, out = make_run(tmp_path / "run", [0, 1]), tmp_path / "out"
    assert plot.main([str(run), "--out", str(out)]) == 0
    (out / plot.LIST).write_bytes(b"\xff")
    with pytest.raises(SystemExit):
        plot.main([str(run), "--out", str(out)])
    assert "changed since (curves.png, " in capsys.readouterr().err


def test_an_interrupted_drawing_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    run, out = make_run(tmp_path / "run", [0, 1]), tmp_path / "out"
    assert plot.main([str(run), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(before) == {*plot.FILES, plot.LIST}
    make_files = plot.make_files

    def interrupted(*args):
        make_files(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "make_files", interrupted)
    make_run(tmp_path / "more", [5, 6], seed=2)
    with pytest.raises(KeyboardInterrupt):
        plot.main([str(tmp_path), "--out", str(out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_plotting_needs_no_torch():
    code = "import sys, plot; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=plot.PUBLISHED.parents[1], text=True) == "False\n"
