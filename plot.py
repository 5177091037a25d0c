"""Draws learning curves and writes tables of scores, beside published ones: `python plot.py --help`."""

from __future__ import annotations

from support import start

if __name__ == "__main__":
    start.program()

import csv
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

from support import report
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
FILES = ("curves.png", "curves.svg", "scores.md", "scores.csv", "evaluations.csv")
WRITTEN = ".plot_files"  # their checksums, which tell them from files of others, and from files that a user has changed
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error)  # by damaged files
matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same runs give the same file


class Run(NamedTuple):
    """The evaluations of one run. Steps are environment steps."""

    folder: Path
    task: str
    method: str
    seed: int
    steps: np.ndarray  # (N,), rising
    returns: np.ndarray  # (N,)
    deviations: np.ndarray  # (N,), between the episodes of an evaluation; NaN where eval.log does not say
    commits: list[str]  # (N), of the code; empty without a starts.log
    interval: int  # the smallest distance between two evaluations
    flags: dict[str, Any]


class Score(NamedTuple):
    """A published score."""

    task: str
    method: str
    steps: int  # environment steps
    mean: float
    std: float  # NaN if it is not published
    source: str


def find_runs(folders: Iterable[Path]) -> Iterator[Run]:
    """Reads the runs in and below the folders, each once. Leaves unreadable ones out, with a line on stderr."""
    paths: dict[Path, Path] = {}  # by what they resolve to
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("args.json"))
        for path in found:
            paths.setdefault(path.resolve(), path)
        if not found:
            what = "no run there, nothing with an args.json" if folder.is_dir() else "the folder does not exist"
            print(f"{folder}: {what}", file=sys.stderr)
    for path in paths.values():
        try:
            yield read_run(path)
        except UNREADABLE as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{path} is left out, a log or its args.json cannot be read: {reason}", file=sys.stderr)


def read_run(folder: Path) -> Run:
    """Reads a run of this project or the authors' script. Raises one of UNREADABLE if a file is missing or damaged."""
    args = json.loads((folder / "args.json").read_text())
    records = [json.loads(line) for line in (folder / "eval.log").read_text().split("\n")[:-1]]  # complete lines
    repeat = int(args["action_repeat"])  # environment steps per step; the authors log steps only
    returns = np.array([float(record["episode_reward"]) for record in records])
    steps = np.array([float(each.get("environment_steps", each.get("step", np.nan) * repeat)) for each in records])
    if not len(steps) or (np.diff(steps) <= 0).any() or not np.isfinite([steps, returns]).all():
        raise ValueError("there are no evaluations, their steps do not rise, or a number is not finite")
    deviations = np.array([float(record.get("episode_reward_std", np.nan)) for record in records])
    # The run's parts, each from its step on.
    log = folder / "starts.log"
    starts = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    before = [[start["commit"] for start in starts if start["step"] * repeat <= step] for step in steps]
    commits = [names[-1] if names else "" for names in before]
    task = f"{args['domain_name']}_{args['task_name']}"
    method, interval = METHODS[args["encoder_type"], args["decoder_type"]], int(args["eval_freq"]) * repeat
    return Run(folder, task, method, int(args["seed"]), steps, returns, deviations, commits, interval, args)


def read_published(path: Path) -> list[Score]:
    """Reads published scores. Raises one of UNREADABLE if the file is missing or damaged."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, restval=""))
    numbers = [(int(row["environment_steps"]), float(row["mean_return"]), float(row["std"] or "nan")) for row in rows]
    return [Score(row["task"], row["method"], *of, row["source"]) for row, of in zip(rows, numbers, strict=True)]


def grouped(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Returns the runs by method and task, sorted."""
    keys = sorted({(run.method, run.task) for run in runs})
    return {key: [run for run in runs if (run.method, run.task) == key] for key in keys}


def least_length(runs: Iterable[Run]) -> float:
    """Returns half the environment steps of the longest run. Runs below it would cut the mean curve short."""
    return max(run.steps[-1] for run in runs) / 2


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yields a line for each reason to doubt an average: different flags, equal seeds, a run that is too short."""
    for (method, task), group in grouped(runs).items():
        names = sorted({name for run in group for name in run.flags} - FREE)
        differ = [name for name in names if len({str(run.flags[name]) for run in group if name in run.flags}) > 1]
        if differ:
            yield f"note: the runs of {method} on {task} are averaged though they differ in {', '.join(differ)}"
        if len({run.seed for run in group}) < len(group):
            yield f"note: the runs of {method} on {task} are averaged though some have the same seed"
        for run in group:
            if run.steps[-1] < least_length(group):
                yield f"note: {run.folder} is not in the curve of the mean: it is not half as far as the longest run"


def estimate(samples: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Returns the mean of one sample (N,), or the interquartile mean of several tasks, and its 95 % interval."""
    cut = 0.25 if len(samples) > 1 else 0
    rng = np.random.default_rng(0)  # for the bootstrap, which resamples each task by itself (arXiv 2108.13264)
    resampled = np.concatenate([rng.choice(sample, (10_000, len(sample))) for sample in samples], axis=1)
    low, high = np.percentile(stats.trim_mean(resampled, cut, axis=1), (2.5, 97.5))
    return stats.trim_mean(np.concatenate(samples), cut), low, high


def curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Returns environment steps (N,), and mean return with interval (N, 3), over the runs that are long enough."""
    runs = [run for run in runs if run.steps[-1] >= least_length(runs)]
    end = min(run.steps[-1] for run in runs)
    grid = np.unique(np.concatenate([run.steps for run in runs]))
    grid = grid[(grid <= end) & (grid >= min(end, max(run.steps[0] for run in runs)))]
    values = [np.interp(grid, run.steps, run.returns) for run in runs]
    return grid, np.array([estimate([column]) for column in np.transpose(values)])


def scores_at(runs: Iterable[Run], budget: int) -> np.ndarray:
    """Returns the last returns (N,) within a budget in environment steps, of the N runs that reach it."""
    # As in the DrQ paper (arXiv 2004.13649): with evaluations every 80k steps, the score at 500k is from 480k.
    reached = [run for run in runs if run.steps[-1] + run.interval > budget]
    within = [run.returns[(run.steps > 0) & (run.steps <= budget)] for run in reached]
    return np.array([returns[-1] for returns in within if len(returns)])


def draw(runs: Sequence[Run], published: Sequence[Score]) -> Figure:
    """Returns the figure, a panel per task: each run faint, the mean and its interval, and published scores."""
    tasks = sorted({run.task for run in runs})
    columns, rows = min(3, len(tasks)), -(-len(tasks) // 3)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    legend: dict[str, Any] = {}
    for index, task in enumerate(tasks, start=1):
        axis = figure.add_subplot(rows, columns, index)
        shown = [run for run in runs if run.task == task]
        shift = 0.025 * max(run.steps[-1] for run in shown)  # keeps the table's scores of several methods apart
        for number, ((method, _), group) in enumerate(grouped(shown).items(), start=1):
            colour, line, marker = STYLES[method]
            style: dict[str, Any] = {"color": colour, "marker": marker}
            for run in group:
                axis.plot(run.steps, run.returns, color=colour, alpha=0.25, linewidth=0.8)
            grid, means = curve(group)
            axis.plot(grid, means[:, 0], line, ms=3, label=f"{method}, here (mean, 95 %)", **style)
            axis.fill_between(grid, means[:, 1], means[:, 2], color=colour, alpha=0.2, linewidth=0)
            end = 1.25 * max(run.steps[-1] for run in group)
            near = [score for score in published if score[:2] == (task, method) and score.steps <= end]
            figures = np.array([(score.steps, score.mean) for score in near if "figure" in score.source])
            if len(figures):
                label = f"{method}, published figure"
                axis.plot(*figures.T, "--", ms=4, mfc="white", linewidth=0.8, label=label, **style)
            tables = np.array([score[2:5] for score in near if "DrQ" in score.source and score.steps in BUDGETS])
            if len(tables):
                steps, mean, std = tables.T
                label = f"{method}, DrQ paper's table"
                axis.errorbar(
                    steps + number * shift, mean, std, ls="", ms=6, capsize=3, mec="black", label=label, **style
                )
        axis.set(title=task.replace("_", " "), xlabel="environment steps", ylabel="return", xlim=(0, None))
        if all((run.returns >= 0).all() for run in shown):  # as in all tasks of the paper
            axis.set_ylim(-20, 1020)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def table(runs: Sequence[Run], published: Sequence[Score]) -> Iterator[Sequence[str]]:
    """Yields names of columns and, for each budget, a row per method and task, then each method's mean over tasks."""
    yield "method", "task", "environment steps", "seeds", "return", "deviation", "95 %", "published"
    known = {score[:3]: score for score in published if "DrQ" in score.source}
    for budget in BUDGETS:
        scores = {key: scores_at(group, budget) for key, group in grouped(runs).items()}
        entries = [(*key, [sample]) for key, sample in scores.items()]
        for method in sorted({run.method for run in runs}):
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
            score = known.get((name, method, budget))
            text = "not published" if score is None else f"{score.mean:g} ± {score.std:g}"
            yield method, name, f"{budget}", f"{seeds}", value, deviation, interval, text


def make_files(folder: Path, runs: Sequence[Run], published: Sequence[Score]) -> None:
    """Writes FILES into an empty folder."""
    figure, scores = draw(runs, published), list(table(runs, published))
    figure.savefig(folder / "curves.png", dpi=150)
    figure.savefig(folder / "curves.svg", metadata={"Date": None})
    rows = [scores[0], ["---"] * len(scores[0]), *scores[1:]]
    (folder / "scores.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
    evaluations: list[Sequence[Any]] = [
        ("task", "method", "seed", "environment steps", "return", "deviation between episodes", "commit")
    ]
    for run in runs:
        about, columns = (
            (run.task, run.method, run.seed),
            (run.steps.astype(int), run.returns, run.deviations, run.commits),
        )
        evaluations += [(*about, *row) for row in zip(*columns, strict=True)]
    for name, content in {"scores.csv": scores, "evaluations.csv": evaluations}.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(content)


def checksums(folder: Path) -> Iterator[str]:
    """Yields a line for each of FILES that can be read: its name and SHA-256."""
    for name in FILES:
        with suppress(OSError):
            yield f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}"


def not_mine(out: Path) -> list[str]:
    """Returns which of FILES in the folder are not as this program has written them."""
    written: list[str] = []
    with suppress(OSError, ValueError):  # there is no list, or no text in it
        written = (out / WRITTEN).read_text().splitlines()
    mine = {line.split()[0] for line in checksums(out) if line in written}
    return [name for name in FILES if os.path.lexists(out / name) and name not in mine]


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
    runs = list(find_runs(map(Path, args.folders)))
    if not runs:
        parser.error("there is no run to draw")
    if others := not_mine(out):
        what = "files that plot.py has not written, or that were changed since"
        parser.error(f"--out {out} holds {what} ({', '.join(others)}): move them away, or choose another folder")
    print("".join(f"{line}\n" for line in notes(runs)), file=sys.stderr, end="")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".plot.", dir=out) as folder:  # so that files appear whole
            make_files(Path(folder), runs, published)
            # The list comes first, with both old and new files: an interrupted call leaves some of either.
            lines = [*checksums(out), *checksums(Path(folder))]
            (Path(folder) / WRITTEN).write_text("".join(f"{line}\n" for line in lines))
            for name in (WRITTEN, *FILES):
                (Path(folder) / name).replace(out / name)
    except OSError as error:
        parser.error(f"--out {out} cannot be written: {error.strerror}")
    with report.one_line(parser.fail):
        report.show((out / "scores.md").read_text().rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
