"""Draws learning curves and writes tables of scores, beside published ones: `python plot.py --help`."""

from __future__ import annotations

from support import signals

if __name__ == "__main__":
    signals.start_program()

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

from errors import UserError
from support.flags import OneLineParser, user_path

PUBLISHED = Path(__file__).parent / "results" / "published.csv"
BUDGETS = (100_000, 500_000)  # environment steps
METHODS = {  # by the types of encoder and decoder
    ("pixel", "pixel"): "SAC+AE:pixel",
    ("pixel", "identity"): "SAC:pixel",
    ("identity", "identity"): "SAC:state",
}
STYLES = {  # colours for colour-blind readers (Okabe and Ito), lines and markers for black-and-white prints
    "SAC+AE:pixel": ("#0072B2", "-", "o"),
    "SAC:pixel": ("#D55E00", "-.", "^"),
    "SAC:state": ("#009E73", ":", "s"),
}
FREE = {  # flags that may differ among averaged runs
    *("seed", "work_dir", "resume", "overwrite", "device", "num_train_steps", "replay_device", "cuda_graph", "compile"),
    *("checkpoint_minutes", "checkpoint_freq", "eval_freq", "eval_workers", "num_eval_episodes"),
    *("save_tb", "save_model", "save_buffer", "save_video"),
}
COLUMNS = ["task", "method", "seed", "environment steps", "return", "deviation between episodes", "commit"]
FILES = ("curves.png", "curves.svg", "scores.md", "scores.csv", "evaluations.csv")
LIST = ".plot_files"  # the checksums of FILES in its folder, as this program wrote them: it replaces no others
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)  # by damaged files
matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same runs give the same file


def read_runs(folders: Iterable[Path]) -> pd.DataFrame:
    """Reads the runs in and below the folders, each once. Leaves unreadable ones out, with a line on stderr."""
    paths: dict[Path, Path] = {}  # by what they resolve to
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("args.json"))
        for path in found:
            paths.setdefault(path.resolve(), path)
        if not found:
            what = "no run there, nothing with an args.json" if folder.is_dir() else "the folder does not exist"
            print(f"{folder}: {what}", file=sys.stderr)
    runs = [pd.DataFrame()]  # if there is no run
    for path in paths.values():
        try:
            runs.append(read_run(path))
        except UNREADABLE as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{path} is left out, a log or its args.json cannot be read: {reason}", file=sys.stderr)
    return pd.concat(runs, ignore_index=True)


def read_run(folder: Path) -> pd.DataFrame:
    """Reads a run of this project or the authors' script. Raises one of UNREADABLE if a file is missing or damaged.

    Returns:
        A row for each evaluation: COLUMNS, with NaN for what eval.log does not say and no commit without a starts.log;
        and, the same in all rows, `run`, the folder; `interval` and `end`, the distance of two evaluations and the last
        one, in environment steps; and each flag that is not FREE as text, in a column named `--flag`.
    """
    flags = json.loads((folder / "args.json").read_text())
    repeat = int(flags["action_repeat"])  # environment steps per step; the authors log steps only
    log = pd.DataFrame([dict(json.loads(line)) for line in (folder / "eval.log").read_text().split("\n")[:-1]])
    log = log.reindex(columns=["environment_steps", "step", "episode_reward", "episode_reward_std"]).astype(float)
    steps, returns = log["environment_steps"].fillna(log["step"] * repeat), log["episode_reward"]
    if log.empty or (steps.diff() <= 0).any() or not np.isfinite([steps, returns]).all():
        raise ValueError("there are no evaluations, their steps do not rise, or a number is missing")
    path = folder / "starts.log"  # of the run's parts, each from its step on
    starts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    commits = [[start["commit"] for start in starts if start["step"] * repeat <= step] for step in steps]
    columns = {
        "task": f"{flags['domain_name']}_{flags['task_name']}",
        "method": METHODS[flags["encoder_type"], flags["decoder_type"]],
        "seed": int(flags["seed"]),
        "environment steps": steps.astype(int),
        "return": returns,
        "deviation between episodes": log["episode_reward_std"],
        "commit": [names[-1] if names else "" for names in commits],
        "run": folder,
        "interval": int(flags["eval_freq"]) * repeat,
        "end": steps.iloc[-1],
        **{f"--{name}": str(value) for name, value in flags.items() if name not in FREE},
    }
    return pd.DataFrame(columns)


def read_published(path: Path) -> pd.DataFrame:
    """Reads published scores. Raises one of UNREADABLE if the file is missing or damaged."""
    kinds = {"task": str, "method": str, "environment_steps": int, "mean_return": float, "std": float, "source": str}
    return pd.read_csv(path, dtype=kinds)[list(kinds)]


def notes(evaluations: pd.DataFrame) -> Iterator[str]:
    """Yields a line for each reason to doubt an average: different flags, equal seeds, a run that is too short."""
    for (method, task), runs in evaluations.groupby(["method", "task"]):
        averaged = f"note: the runs of {method} on {task} are averaged though"
        differ = sorted(name for name, values in runs.filter(like="--").items() if values.nunique() > 1)
        if differ:
            yield f"{averaged} they differ in {', '.join(differ)}"
        if runs.drop_duplicates("run")["seed"].duplicated().any():
            yield f"{averaged} some have the same seed"
        for run in runs["run"][runs["end"] < runs["end"].max() / 2].unique():
            yield f"note: {run} is not in the curve of the mean: it is not half as far as the longest run"


def estimate(samples: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Returns the mean of one sample (N,), or the interquartile mean of several tasks, and its 95 % interval."""
    cut = 0.25 if len(samples) > 1 else 0
    rng = np.random.default_rng(0)  # for the bootstrap, which resamples each task by itself (arXiv 2108.13264)
    resampled = np.concatenate([rng.choice(sample, (10_000, len(sample))) for sample in samples], axis=1)
    low, high = np.percentile(stats.trim_mean(resampled, cut, axis=1), (2.5, 97.5))
    return stats.trim_mean(np.concatenate(samples), cut), low, high


def curve(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns mean return and its interval, by environment steps, as far as all runs go that are long enough."""
    runs = runs[runs["end"] >= runs["end"].max() / 2]  # a shorter one would cut the curve short
    returns = runs.pivot(index="environment steps", columns="run", values="return")
    shared = returns.interpolate(method="index", limit_area="inside").dropna()
    means = [estimate([row]) for row in shared.to_numpy()]
    return pd.DataFrame(means, shared.index, ["mean", "low", "high"], dtype=float)


def scores_at(runs: pd.DataFrame, budget: int) -> np.ndarray:
    """Returns the last returns (N,) within a budget in environment steps, of the N runs that reach it."""
    # As in the DrQ paper (arXiv 2004.13649): with evaluations every 80k steps, the score at 500k is from 480k.
    reached = runs[(runs["end"] + runs["interval"] > budget) & runs["environment steps"].between(1, budget)]
    return reached.groupby("run", sort=False)["return"].last().to_numpy()


def draw(evaluations: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Returns the figure, a panel per task: each run faint, the mean and its interval, and published scores."""
    tasks = evaluations.groupby("task")
    columns, rows = min(3, len(tasks)), -(-len(tasks) // 3)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    legend: dict[str, Any] = {}
    for index, (task, shown) in enumerate(tasks, start=1):
        axis = figure.add_subplot(rows, columns, index)
        for number, (method, runs) in enumerate(shown.groupby("method"), start=1):
            colour, line, marker = STYLES[method]
            style: dict[str, Any] = {"color": colour, "marker": marker}
            for _, run in runs.groupby("run", sort=False):
                axis.plot(run["environment steps"], run["return"], color=colour, alpha=0.25, linewidth=0.8)
            means = curve(runs)
            axis.plot(means["mean"], line, ms=3, label=f"{method}, here (mean, 95 %)", **style)
            axis.fill_between(means.index, means["low"], means["high"], color=colour, alpha=0.2, linewidth=0)
            near = published[published["environment_steps"] <= 1.25 * runs["end"].max()]
            near = near[(near["task"] == task) & (near["method"] == method)].set_index("environment_steps")
            points = near["mean_return"][near["source"].str.contains("figure")]
            if len(points):
                label = f"{method}, published figure"
                axis.plot(points, "--", ms=4, mfc="white", linewidth=0.8, label=label, **style)
            points = near[near["source"].str.contains("DrQ") & near.index.isin(BUDGETS)]
            if len(points):
                steps = points.index + 0.025 * number * shown["end"].max()  # keeps several methods apart
                mean, std, label = points["mean_return"], points["std"], f"{method}, DrQ paper's table"
                axis.errorbar(steps, mean, std, ls="", ms=6, capsize=3, mec="black", label=label, **style)
        axis.set(title=task.replace("_", " "), xlabel="environment steps", ylabel="return", xlim=(0, None))
        if (shown["return"] >= 0).all():  # as in all tasks of the paper
            axis.set_ylim(-20, 1060)  # a return is at most 1000; a published deviation may reach beyond
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def table(evaluations: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Returns, for each budget, a row per method and task, then each method's mean over tasks, as text."""
    drq = published[published["source"].str.contains("DrQ")]
    known = {tuple(key): f"{mean:g} ± {std:g}" for *key, mean, std, _ in drq.to_numpy()}
    rows = []
    for budget in BUDGETS:
        scores = {key: scores_at(runs, budget) for key, runs in evaluations.groupby(["method", "task"])}
        entries = [(*key, [sample]) for key, sample in scores.items()]
        for method in sorted(evaluations["method"].unique()):
            samples = [sample for key, sample in scores.items() if key[0] == method]
            # An interquartile mean needs four scores. Only equal numbers of seeds give tasks equal weights.
            if len(samples) > 1 and sum(map(len, samples)) >= 4 and len({*map(len, samples)}) == 1:
                entries.append((method, f"interquartile mean of {len(samples)} tasks", samples))
        for method, name, samples in entries:
            seeds = len(samples[0])
            mean, low, high = estimate(samples) if seeds else (np.nan,) * 3
            value = f"{mean:.1f}" if seeds else "not reached"
            deviation = f"{np.std(samples[0], ddof=1):.1f}" if seeds > 1 and len(samples) == 1 else ""
            interval = f"{low:.1f} to {high:.1f}" if seeds > 1 else ""
            score = known.get((name, method, budget), "not published")
            rows.append((method, name, f"{budget}", f"{seeds}", value, deviation, interval, score))
    columns = ["method", "task", "environment steps", "seeds", "return", "deviation", "95 %", "published"]
    return pd.DataFrame(rows, columns=columns)


def make_files(folder: Path, evaluations: pd.DataFrame, published: pd.DataFrame) -> None:
    """Writes FILES into an empty folder."""
    figure, scores = draw(evaluations, published), table(evaluations, published)
    figure.savefig(folder / "curves.png", dpi=150)
    figure.savefig(folder / "curves.svg", metadata={"Date": None})
    rows = [scores.columns, ["---"] * len(scores.columns), *scores.to_numpy()]
    (folder / "scores.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
    scores.to_csv(folder / "scores.csv", index=False)
    evaluations.to_csv(folder / "evaluations.csv", columns=COLUMNS, index=False, na_rep="nan")


def checksums(folder: Path) -> dict[str, str]:
    """Returns the lines of LIST, name and SHA-256, of those of FILES that can be read."""
    lines = {}
    for name in FILES:
        with suppress(OSError):
            lines[name] = f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}"
    return lines


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=user_path, help="work_dirs of runs, or folders that contain them")
    parser.add_argument("--out", type=user_path, default="plots", help="folder for the figure and the tables")
    parser.add_argument("--published", type=user_path, default=str(PUBLISHED), help="CSV file of published scores")
    args = parser.parse_args(argv)
    out = Path(args.out)
    try:
        published = read_published(Path(args.published))
    except UNREADABLE as error:
        parser.error(f"{args.published} cannot be read as published scores: {error}")
    evaluations = read_runs(map(Path, args.folders))
    if evaluations.empty:
        parser.error("there is no run to draw")
    try:
        mine = (out / LIST).read_text(errors="replace").splitlines() if (out / LIST).exists() else []
        old = checksums(out)
        if others := [name for name in FILES if os.path.lexists(out / name) and old.get(name) not in mine]:
            what = f"files that plot.py has not written, or that were changed since ({', '.join(others)})"
            parser.error(f"--out {out} holds {what}: move them away, or choose another folder")
        for line in notes(evaluations):
            print(line, file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".plot.", dir=out) as folder:  # so that files appear whole
            make_files(Path(folder), evaluations, published)
            # The list comes first, with both old and new files: an interrupted call leaves some of either.
            lines = [*old.values(), *checksums(Path(folder)).values()]
            (Path(folder) / LIST).write_text("".join(f"{line}\n" for line in lines))
            for name in (LIST, *FILES):
                (Path(folder) / name).replace(out / name)
        signals.show((out / "scores.md").read_text().rstrip())
    except OSError as error:
        parser.error(f"--out {out} cannot be written: {error.strerror}")
    except UserError as error:
        parser.fail(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
