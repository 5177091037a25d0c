"""Learning curves and tables of any number of runs, beside the published ones: `python plot.py --help`."""

from __future__ import annotations

import streams

if __name__ == "__main__":
    streams.mend()

import argparse
import csv
import io
import json
import os
import sys
import uuid
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files are all that is made: no display is needed
import matplotlib.pyplot as plt
import matplotlib.ticker as ticker
import numpy as np
from scipy import stats

from flags import OneLineParser, user_path

PUBLISHED = Path(__file__).parent / "results" / "published.csv"
BUDGETS = (100_000, 500_000)  # environment steps
# Method by the types of encoder and decoder.
METHODS = {
    ("pixel", "pixel"): "SAC+AE:pixel",
    ("pixel", "identity"): "SAC:pixel",
    ("identity", "identity"): "SAC:state",
}
# Colours that colour-blind readers tell apart (Okabe and Ito), lines and dots that a black-and-white print does.
STYLES = {
    "SAC+AE:pixel": ("#0072B2", "-", "o"),
    "SAC:pixel": ("#D55E00", "-.", "^"),
    "SAC:state": ("#009E73", ":", "s"),
}
# Flags whose values may differ among runs that are averaged.
FREE = {
    *("seed", "work_dir", "resume", "overwrite", "device", "num_train_steps", "replay_device", "cuda_graph", "compile"),
    *("checkpoint_minutes", "checkpoint_freq", "eval_freq", "eval_workers", "num_eval_episodes"),
    *("save_tb", "save_model", "save_buffer", "save_video"),
}
FILES = ("curves.png", "curves.svg", "scores.md", "scores.csv", "evaluations.csv")
MADE = ".plot.json"
RESAMPLES = 10_000
matplotlib.rcParams["svg.hashsalt"] = "curves"  # the same runs give the same file


class Run(NamedTuple):
    """The evaluations of one run."""

    folder: Path
    task: str
    method: str
    seed: int
    steps: np.ndarray  # environment steps, rising
    returns: np.ndarray
    interval: int  # environment steps between evaluations, at least
    flags: dict[str, Any]


class Score(NamedTuple):
    """A published number."""

    task: str
    method: str
    steps: int
    mean: float
    std: float | None
    source: str


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def find_runs(folders: Iterable[Path]) -> Iterator[Run]:
    """The runs in the folders and below them; what cannot be read is said in a line on stderr, and left out."""
    found: set[Path] = set()
    for folder in folders:
        paths = sorted(path.parent for path in folder.rglob("args.json"))
        if not folder.is_dir():
            print(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}", file=sys.stderr)
        elif not paths:
            print(f"{folder}: no run there, nothing with an args.json", file=sys.stderr)
        for path in paths:
            if path.resolve() in found:
                continue
            found.add(path.resolve())
            try:
                yield read_run(path)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                print(f"{path} is left out, its args.json or eval.log cannot be read: {reason}", file=sys.stderr)


def read_run(folder: Path) -> Run:
    """A run's evaluations. A last line without its end, which is just being written, is none yet.

    Lines of the authors' script have no `environment_steps`: those are its steps times the action repeat.

    Raises:
        OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError: the files are missing or damaged.
    """
    args = json.loads((folder / "args.json").read_text())
    lines = (folder / "eval.log").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    repeat = int(args["action_repeat"])
    taken = (
        record["environment_steps"] if "environment_steps" in record else record["step"] * repeat for record in records
    )
    steps = np.array([float(step) for step in taken])
    returns = np.array([float(record["episode_reward"]) for record in records])
    if not len(steps) or (np.diff(steps) <= 0).any():
        raise ValueError("its evaluations are none, or out of order")
    if not (np.isfinite(steps).all() and np.isfinite(returns).all()):
        raise ValueError("its steps or returns are no numbers")
    task = f"{args['domain_name']}_{args['task_name']}"
    method = METHODS[args["encoder_type"], args["decoder_type"]]
    interval = int(args["eval_freq"]) * repeat
    return Run(folder, task, method, int(args["seed"]), steps, returns, interval, args)


def doubts(runs: Sequence[Run]) -> list[str]:
    """A line for each method and task whose runs are averaged though they have other flags, or the same seed."""
    lines = []
    for (method, task), group in grouped(runs).items():
        names = sorted({name for run in group for name in run.flags} - FREE)
        differ = [name for name in names if len({str(run.flags[name]) for run in group if name in run.flags}) > 1]
        about = f"the runs of {method} on {task} are averaged though"
        if differ:
            lines.append(f"note: {about} they differ in {', '.join(differ)}")
        if len({run.seed for run in group}) < len(group):
            lines.append(f"note: {about} some have the same seed")
        lines += [
            f"note: {run.folder} is not in the curve of the mean: it is not half as far as the longest run"
            for run in group
            if run.folder not in {each.folder for each in far(group)}
        ]
    return lines


def grouped(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by method and task."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.method, run.task].append(run)
    return dict(sorted(groups.items()))


def read_published(path: Path) -> list[Score]:
    """The published scores.

    Raises:
        OSError, ValueError, KeyError: the file is missing or damaged.
    """
    with path.open(newline="") as file:
        return [
            Score(
                row["task"],
                row["method"],
                int(row["environment_steps"]),
                float(row["mean_return"]),
                float(row["std"]) if row["std"] else None,
                row["source"],
            )
            for row in csv.DictReader(file)
        ]


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of values (N,), with the interval over N; without one where N is 1."""
    if len(values) == 1 or np.ptp(values) == 0:
        return Estimate(*[float(values.mean())] * 3)
    interval = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return Estimate(float(values.mean()), *map(float, interval.confidence_interval))


def interquartile_mean_estimate(values: Sequence[np.ndarray]) -> Estimate:
    """Mean of the middle half of all values, drawn anew task by task for the interval (arXiv 2108.13264).

    Args:
        values: of each task, (N,) for N seeds.
    """
    rng = np.random.default_rng(0)
    resampled = np.concatenate([rng.choice(task, (RESAMPLES, len(task))) for task in values], axis=1)
    low, high = np.percentile(stats.trim_mean(resampled, 0.25, axis=1), (2.5, 97.5))
    return Estimate(float(stats.trim_mean(np.concatenate(values), 0.25)), float(low), float(high))


def far(runs: Sequence[Run]) -> list[Run]:
    """Those at least half as far as the longest: of one that has just begun, a mean would be as short as it is."""
    return [run for run in runs if run.steps[-1] >= max(run.steps[-1] for run in runs) / 2]


def curve(runs: Sequence[Run]) -> tuple[np.ndarray, list[Estimate]]:
    """Environment steps up to where the shortest run ends, and the mean over the runs, between evaluations a line.

    Only of runs that are `far`.
    """
    runs = far(runs)
    end = min(run.steps[-1] for run in runs)
    grid = np.unique(np.concatenate([run.steps for run in runs]))
    grid = grid[(grid <= end) & (grid >= min(end, max(run.steps[0] for run in runs)))]
    values = np.stack([np.interp(grid, run.steps, run.returns) for run in runs])
    return grid, [mean_estimate(column) for column in values.T]


def score_at(run: Run, budget: int) -> float | None:
    """The last evaluation within a budget of environment steps; None if a later one could come within it.

    As the DrQ paper reads scores (arXiv 2004.13649): where evaluations come every 80k steps, 500k means 480k.
    """
    within = run.returns[(run.steps <= budget) & (run.steps > 0)]
    if not len(within) or run.steps[-1] + run.interval <= budget:
        return None
    return float(within[-1])


def published_score(published: Sequence[Score], task: str, method: str, budget: int) -> Score | None:
    """What the DrQ paper's table says."""
    found = (
        score
        for score in published
        if (score.task, score.method, score.steps) == (task, method, budget) and "DrQ" in score.source
    )
    return next(found, None)


def draw(runs: Sequence[Run], published: Sequence[Score]) -> Any:
    """The figure: a panel for each task; our means with intervals, single seeds faint, published scores beside them."""
    tasks = sorted({run.task for run in runs})
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for task, axis in zip(tasks, axes.flat, strict=False):
        draw_task(axis, [run for run in runs if run.task == task], [score for score in published if score.task == task])
        axis.set_title(task.replace("_", " "))
        axis.set_xlabel("environment steps")
        axis.set_ylabel("return")
        if all((run.returns >= 0).all() for run in runs if run.task == task):  # as in all tasks of the paper
            axis.set_ylim(-20, 1020)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 100k, 1M
        axis.grid(alpha=0.3)
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def draw_task(axis: Any, runs: Sequence[Run], published: Sequence[Score]) -> None:
    """One panel."""
    longest = max(run.steps[-1] for run in runs)
    methods = [method for method in STYLES if any(run.method == method for run in runs)]
    for index, method in enumerate(methods):
        colour, line, marker = STYLES[method]
        mine = [run for run in runs if run.method == method]
        for run in mine:
            axis.plot(run.steps, run.returns, color=colour, alpha=0.25, linewidth=0.8)
        grid, means = curve(mine)
        values, lows, highs = np.array(means).T
        label = f"{method}, here (mean, 95 %)"
        axis.plot(grid, values, line, marker=marker, markersize=3, color=colour, label=label)
        axis.fill_between(grid, lows, highs, color=colour, alpha=0.2, linewidth=0)
        end = max(run.steps[-1] for run in mine)
        scores = [score for score in published if score.method == method and score.steps <= 1.25 * end]
        read_off = [score for score in scores if "figure" in score.source]
        if read_off:
            axis.plot(
                [score.steps for score in read_off],
                [score.mean for score in read_off],
                "--",
                marker=marker,
                color=colour,
                markersize=4,
                markerfacecolor="white",
                linewidth=0.8,
                label=f"{method}, published figure",
            )
        for budget in BUDGETS:
            score = published_score(scores, mine[0].task, method, budget)
            if score is not None:
                axis.errorbar(
                    budget + 0.025 * longest * (index + 1),  # beside the curves and those of other methods
                    score.mean,
                    yerr=score.std,
                    fmt=marker,
                    color=colour,
                    markersize=6,
                    capsize=3,
                    markeredgecolor="black",
                    label=f"{method}, DrQ paper's table",
                )


def table(runs: Sequence[Run], published: Sequence[Score]) -> list[dict[str, str]]:
    """Rows of returns at the budgets: ours with seeds and interval, published; then over all tasks of a method."""
    rows = []
    for budget in BUDGETS:
        by_method: dict[str, list[np.ndarray]] = defaultdict(list)
        for (method, task), group in grouped(runs).items():
            scores = [score for run in group if (score := score_at(run, budget)) is not None]
            by_method[method].append(np.array(scores))
            rows.append(row(method, task, budget, scores, published_score(published, task, method, budget)))
        for method, values in by_method.items():
            seeds = len(values[0])
            # With fewer scores there are no outer quarters; with uneven ones a task would count more than another.
            if len(values) == 1 or seeds * len(values) < 4 or any(len(scores) != seeds for scores in values):
                continue
            estimate = interquartile_mean_estimate(values)
            interval = between(estimate) if seeds > 1 else ""
            rows.append(
                row(method, f"interquartile mean of {len(values)} tasks", budget, [], None)
                | {"seeds": f"{seeds}", "return": f"{estimate.value:.1f}", "95 %": interval}
            )
    return rows


def row(method: str, task: str, budget: int, scores: Sequence[float], published: Score | None) -> dict[str, str]:
    """One row of the table."""
    estimate = mean_estimate(np.array(scores)) if scores else None
    text = "not published" if published is None else f"{published.mean:g}"
    if published is not None and published.std is not None:
        text += f" ± {published.std:g}"
    return {
        "method": method,
        "task": task,
        "environment steps": f"{budget}",
        "seeds": f"{len(scores)}",
        "return": "not reached" if estimate is None else f"{estimate.value:.1f}",
        "deviation": f"{np.std(scores, ddof=1):.1f}" if len(scores) > 1 else "",
        "95 %": between(estimate) if estimate is not None and len(scores) > 1 else "",
        "published": text,
    }


def between(estimate: Estimate) -> str:
    """An interval as text."""
    return f"{estimate.low:.1f} to {estimate.high:.1f}"


def table_text(rows: Sequence[dict[str, str]]) -> str:
    """The rows as a table in Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([line[name] for name in names] for line in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(rows: Sequence[dict[str, str]]) -> str:
    """The rows as CSV below a line of their names."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def outputs(runs: Sequence[Run], published: Sequence[Score]) -> dict[str, bytes]:
    """Name and content of each file to write."""
    figure, pictures = draw(runs, published), {}
    for name, settings in (("curves.png", {"dpi": 150}), ("curves.svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=name[-3:], **settings)
        pictures[name] = buffer.getvalue()
    plt.close(figure)
    rows = table(runs, published)
    texts = {
        "scores.md": table_text(rows),
        "scores.csv": csv_text(rows),
        "evaluations.csv": csv_text(evaluations(runs)),
    }
    return pictures | {name: text.encode() for name, text in texts.items()}


def made(out: Path) -> dict[str, list[int]]:
    """Checksums of what this program has written into a folder, by file: as `.plot.json` there says."""
    try:
        sums = json.loads((out / MADE).read_text())
        return {name: [int(value) for value in sums[name]] for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        return {name: [] for name in FILES}


def foreign(out: Path) -> list[str]:
    """Files in a folder that this program would overwrite, but has not written, or not as they are now."""
    sums = made(out)
    return [name for name in FILES if os.path.lexists(out / name) and checksum(out / name) not in sums[name]]


def checksum(path: Path) -> int | None:
    """CRC-32 of a file's content; None if it cannot be read."""
    try:
        return zlib.crc32(path.read_bytes())
    except OSError:
        return None


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Writes the files, and first, beside the sums of those that are there, what theirs will be."""
    there = {name: [value for value in (checksum(out / name),) if value is not None] for name in contents}
    sums = {name: [*there[name], zlib.crc32(content)] for name, content in contents.items()}
    for name, content in ({MADE: json.dumps(sums).encode() + b"\n"} | contents).items():
        temporary = out / f".{uuid.uuid4().hex}.tmp"
        temporary.write_bytes(content)
        temporary.replace(out / name)


def evaluations(runs: Sequence[Run]) -> list[dict[str, str]]:
    """All that the figure shows of the runs, a row for each evaluation."""
    return [
        {
            "task": run.task,
            "method": run.method,
            "seed": f"{run.seed}",
            "environment steps": f"{steps:.0f}",
            "return": f"{value}",
        }
        for run in runs
        for steps, value in zip(run.steps, run.returns, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folders", nargs="+", type=user_path, help="work_dirs, or folders that hold some")
    parser.add_argument("--out", type=user_path, default="plots", help="folder of figure and tables")
    parser.add_argument("--published", type=user_path, default=str(PUBLISHED), help="scores to draw beside")
    args = parser.parse_args(argv)
    args.folders, args.out, args.published = [*map(Path, args.folders)], Path(args.out), Path(args.published)
    try:
        published = read_published(args.published)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        parser.error(f"{args.published} cannot be read as published scores: {error}")
    runs = list(find_runs(args.folders))
    if not runs:
        parser.error("there is no run to draw")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made: {error.strerror}")
    if foreign(args.out):
        names = ", ".join(foreign(args.out))
        parser.error(f"--out {args.out} holds other files, or changed ones ({names}): choose another folder")
    for line in doubts(runs):
        print(line, file=sys.stderr)
    contents = outputs(runs, published)
    try:
        write(args.out, contents)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written: {error.strerror}")
    print(contents["scores.md"].decode(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
