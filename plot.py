"""Draws learning curves and writes tables of scores, beside published ones: `python plot.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

import train
from errors import UserError
from files import reading, writing
from support import report
from support.flags import OneLineParser, user_path
from support.published import METHODS

REPLACED = re.compile(r".*\.\d{8}-\d{6}")  # folders of runs that --overwrite of train.py has replaced
PUBLISHED = Path(__file__).parent / "results" / "published.csv"
BUDGETS = (100_000, 500_000)  # environment steps
TITLES = {(method.encoder_type, method.decoder_type): method.title for method in METHODS.values()}
STYLES = {  # colours for colour-blind readers (Okabe and Ito), lines and markers for black-and-white prints
    "SAC+AE:pixel": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "SAC:pixel": {"color": "#D55E00", "linestyle": "-.", "marker": "^"},
    "SAC:state": {"color": "#009E73", "linestyle": ":", "marker": "s"},
}
DEFAULTS = vars(train.make_parser().parse_args([]))
# A run with another value of one of these (docs/experiments.md) is of a method of its own.
VARIANTS = ["agent", "critic_trains_encoder", "actor_trains_encoder", "freeze_encoder", "load_encoder"]
VARIANTS += ["decoder_update_freq", "beta"]
FREE = {"seed", "compile"}  # flags that may differ between averaged runs: these, and those that may change at --resume
FREE |= {name for name, kind in train.make_parser().resume.items() if kind != "fixed"}
COLUMNS = ["task", "method", "seed", "environment steps", "return", "deviation between episodes", "commit"]
matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same runs give the same file


def find_runs(folder: Path) -> dict[Path, Path]:
    """Folders with an args.json in and below a folder, by what they resolve to; without those that --overwrite moved.

    Follows symbolic links, also those in circles.
    """
    found, seen = {}, set[Path]()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := Path(path).resolve()) in seen or (Path(path) != folder and REPLACED.fullmatch(path)):
            folders.clear()  # a link to a folder above would not end
        elif "args.json" in files:
            found[real] = Path(path)
        seen.add(real)
    return found


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """Reads the runs in and below the folders, each once. Leaves unreadable ones out, with a line on stderr."""
    paths, runs = dict[Path, Path](), [pd.DataFrame()]
    for folder in folders:
        paths |= (found := find_runs(folder))
        if not found:
            report.say(f"{folder}: there is no run, nothing with an args.json")
    for path in sorted(paths.values()):
        try:
            runs.append(read_run(path))
        except UserError as error:
            report.say(f"{path} is left out: {error}")
    return pd.concat(runs, ignore_index=True)


def read_run(folder: Path) -> pd.DataFrame:
    """Reads a run of this project or the authors' script. Raises UserError if a file is missing or damaged.

    Returns a row for each evaluation: COLUMNS, with NaN for what eval.log does not say and no commit without a
    starts.log; `run`, the folder; `end`, the run's last evaluation in environment steps; and as text, in columns named
    `--flag`, the flags that are not FREE.
    """
    with reading(path := folder / "args.json"):
        flags = json.loads(path.read_text())
        repeat = int(flags["action_repeat"])  # environment steps per step; the authors log steps only
        changed = {name: flags[name] for name in VARIANTS if flags.get(name, DEFAULTS[name]) != DEFAULTS[name]}
        variant = ", ".join(shown_as(name, value) for name, value in changed.items())
        columns = {
            "task": f"{flags['domain_name']}_{flags['task_name']}",
            "method": TITLES[flags["encoder_type"], flags["decoder_type"]] + (f" ({variant})" if variant else ""),
            "seed": int(flags["seed"]),
        }
    with reading(path := folder / "eval.log"):
        log = pd.DataFrame([dict(json.loads(line)) for line in path.read_text().split("\n")[:-1]])
        log = log.reindex(columns=["environment_steps", "step", "episode_reward", "episode_reward_std"]).astype(float)
        steps, returns = log["environment_steps"].fillna(log["step"] * repeat), log["episode_reward"]
        if log.empty or (steps.diff() <= 0).any() or not np.isfinite([steps, returns]).all():
            raise ValueError("there are no evaluations, their steps do not rise, or a number is missing")
    columns |= {"environment steps": steps.astype(int), "return": returns, "run": folder, "end": steps.iloc[-1]}
    columns |= {"deviation between episodes": log["episode_reward_std"], "commit": ""}
    flags = DEFAULTS | flags  # a flag that is newer than the run had its default value
    runs = pd.DataFrame(columns | {f"--{name}": str(value) for name, value in flags.items() if name not in FREE})
    if (path := folder / "starts.log").exists():
        with reading(path):
            for start in map(json.loads, path.read_text().splitlines()):  # each with the step from which it goes on
                runs.loc[steps >= start["step"] * repeat, "commit"] = start["commit"]
    return runs


def shown_as(name: str, value: Any) -> str:
    """A flag as part of a method's title. Encoders that were loaded from several folders are of one method."""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return {"agent": str(value), "load_encoder": name}.get(name, f"{name} {value}")


def read_published(path: Path) -> pd.DataFrame:
    """Reads published scores. Raises UserError if the file is missing or damaged."""
    kinds = {"task": str, "method": str, "environment_steps": int, "mean_return": float, "std": float, "source": str}
    with reading(path):
        return pd.read_csv(path, dtype=kinds)[list(kinds)]


def long_enough(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that are at least half as long as the longest. Others would cut the curve of the mean short."""
    return runs[runs["end"] >= runs["end"].max() / 2]


def notes(evaluations: pd.DataFrame) -> Iterator[str]:
    """Yields a line for each reason to doubt an average: different flags, equal seeds, a run that is too short."""
    for (method, task), runs in evaluations.groupby(["method", "task"]):
        averaged = f"note: the runs of {method} on {task} are averaged though"
        differ = sorted(name for name, values in runs.filter(like="--").items() if values.nunique() > 1)
        if differ:
            yield f"{averaged} they differ in {', '.join(differ)}"
        if runs.drop_duplicates("run")["seed"].duplicated().any():
            yield f"{averaged} some have the same seed"
        for run in runs["run"].drop(long_enough(runs).index).unique():
            yield f"note: {run} is not in the curve of the mean: it is not half as far as the longest run"


def estimate(samples: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Returns the mean of one sample (N,), or the interquartile mean of several tasks, and its 95 % interval."""
    cut = 0.25 if len(samples) > 1 else 0
    rng = np.random.default_rng(0)  # for the bootstrap, which resamples each task by itself (arXiv 2108.13264)
    resampled = np.concatenate([rng.choice(sample, (10_000, len(sample))) for sample in samples], axis=1)
    low, high = np.percentile(stats.trim_mean(resampled, cut, axis=1), (2.5, 97.5))
    return stats.trim_mean(np.concatenate(samples), cut), low, high


def curve(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns mean return and its interval, by environment steps, as far as all the runs go."""
    returns = runs.pivot(index="environment steps", columns="run", values="return")
    shared = returns.interpolate(method="index", limit_area="inside").dropna()
    means = [estimate([row]) for row in shared.to_numpy()]
    return pd.DataFrame(means, shared.index, ["mean", "low", "high"], dtype=float)


def scores_at(runs: pd.DataFrame, budget: int) -> np.ndarray:
    """Returns the returns (N,) at a budget in environment steps, of the N runs that go on to 90 % of it.

    A run's return is that of its last evaluation within the budget, if that is at 75 % of it or later.
    """
    # As in the DrQ paper (arXiv 2004.13649): with evaluations every 80k steps, the score at 500k is from 480k.
    reached = runs[(runs["end"] >= 0.9 * budget) & runs["environment steps"].between(0.75 * budget, budget)]
    return reached.groupby("run", sort=False)["return"].last().to_numpy()


def draw(evaluations: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Returns the figure, a panel per task: each run faint, the mean and its interval, and published scores."""
    tasks, others = evaluations.groupby("task"), sorted(set(evaluations["method"]) - STYLES.keys())
    styles = STYLES | {
        method: {"color": f"C{index % 10}", "marker": "DPXv"[index // 10 % 4]}
        for index, method in enumerate(others, start=3)
    }
    columns, rows = min(3, len(tasks)), -(-len(tasks) // 3)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    legend: dict[str, Any] = {}
    for index, (task, shown) in enumerate(tasks, start=1):
        axis = figure.add_subplot(rows, columns, index)
        for number, (method, runs) in enumerate(shown.groupby("method"), start=1):
            style: dict[str, Any] = styles[method]
            for _, run in runs.groupby("run", sort=False):
                axis.plot(run["environment steps"], run["return"], color=style["color"], alpha=0.25, linewidth=0.8)
            means = curve(long_enough(runs))
            what = "mean, 95 %" if long_enough(runs)["run"].nunique() > 1 else "one seed"
            axis.plot(means["mean"], ms=3, label=f"{method}, here ({what})", **style)
            axis.fill_between(means.index, means["low"], means["high"], color=style["color"], alpha=0.2, linewidth=0)
            near = published[published["environment_steps"] <= 1.25 * runs["end"].max()]
            near = near[(near["task"] == task) & (near["method"] == method)].set_index("environment_steps")
            for source in ("figure", "DrQ"):
                if (points := near[near["source"].str.contains(source)]).empty:
                    continue
                if source == "figure":
                    more = style | {"mfc": "white", "linestyle": "--", "label": f"{method}, published figure"}
                    axis.plot(points["mean_return"], ms=4, linewidth=0.8, **more)
                else:
                    steps = points.index + 0.025 * number * shown["end"].max()  # keeps several methods apart
                    more = style | {"mec": "black", "linestyle": "", "label": f"{method}, DrQ paper's table"}
                    axis.errorbar(steps, points["mean_return"], points["std"], ms=6, capsize=3, **more)
        axis.set(title=task.replace("_", " "), xlabel="environment steps", ylabel="return", xlim=(0, None))
        if (shown["return"] >= 0).all():  # as in all tasks of the paper
            axis.set_ylim(-20, 1060)  # a return is at most 1000; a published deviation may reach beyond
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if max(map(len, legend)) > 45:  # flags make long titles: one below the other, with room for each
        columns = 1
        figure.set_figheight(figure.get_figheight() + 0.2 * len(legend))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def table(evaluations: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Returns, for each budget and method, a row per task, then the interquartile mean over tasks, as text."""
    drq = published[published["source"].str.contains("DrQ")]
    known = {tuple(key): f"{mean:g} ± {std:g}" for *key, mean, std, _ in drq.to_numpy()}
    rows = []
    for budget, (method, runs_of_method) in itertools.product(BUDGETS, evaluations.groupby("method")):
        entries = {task: [scores_at(runs, budget)] for task, runs in runs_of_method.groupby("task")}
        scores = [sample for samples in entries.values() for sample in samples]
        # An interquartile mean needs four scores. Only equal numbers of seeds give tasks equal weights.
        if len(scores) > 1 and sum(map(len, scores)) >= 4 and len({*map(len, scores)}) == 1:
            entries[f"interquartile mean of {len(scores)} tasks"] = scores
        for name, samples in entries.items():
            seeds = len(samples[0])
            mean, low, high = estimate(samples) if seeds else (np.nan,) * 3
            value = f"{mean:.1f}" if seeds else "not reached"
            deviation = f"{np.std(samples[0], ddof=1):.1f}" if seeds > 1 and len(samples) == 1 else ""
            interval = f"{low:.1f} to {high:.1f}" if seeds > 1 else ""
            score = known.get((name, method, budget), "not published")
            rows.append((method, name, f"{budget}", f"{seeds}", value, deviation, interval, score))
    columns = ["method", "task", "environment steps", "seeds", "return", "deviation", "95 %", "published"]
    return pd.DataFrame(rows, columns=columns)


def write_files(out: Path, evaluations: pd.DataFrame, published: pd.DataFrame) -> None:
    """Writes the figure and the tables into a folder. Raises UserError if it cannot be written."""
    figure, scores = draw(evaluations, published), table(evaluations, published)
    rows = [scores.columns, ["---"] * len(scores.columns), *scores.to_numpy()]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".plot.", dir=out) as temporary:  # so that files appear whole
            folder = Path(temporary)
            figure.savefig(folder / "curves.png", dpi=150)
            figure.savefig(folder / "curves.svg", metadata={"Date": None})
            (folder / "scores.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
            scores.to_csv(folder / "scores.csv", index=False)
            evaluations.to_csv(folder / "evaluations.csv", columns=COLUMNS, index=False, na_rep="nan")
            for path in folder.iterdir():
                path.replace(out / path.name)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=user_path, help="work_dirs of runs, or folders that contain them")
    parser.add_argument("--out", type=user_path, default="plots", help="folder for the figure and the tables")
    parser.add_argument("--published", type=user_path, default=str(PUBLISHED), help="CSV file of published scores")
    args = parser.parse_args(argv)
    out = Path(args.out)
    with report.one_line(parser.error):
        published, evaluations = read_published(Path(args.published)), read_runs(map(Path, args.folders))
        if evaluations.empty:
            raise UserError("there is no run to draw")
        for line in notes(evaluations):
            report.say(line)
        write_files(out, evaluations, published)
    with report.one_line(parser.fail):
        report.show((out / "scores.md").read_text().rstrip())


if __name__ == "__main__":
    main()
