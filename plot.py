"""Draws learning curves and writes tables of scores, beside published ones: `python plot.py --help`."""

from __future__ import annotations

from support import start

if __name__ == "__main__":
    start.program()

import csv
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

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
CHECKSUMS = ".plot.json"
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
    interval: int  # the smallest distance between two evaluations
    flags: dict[str, Any]


class Score(NamedTuple):
    """A published score."""

    task: str
    method: str
    steps: int  # environment steps
    mean: float
    std: float | None
    source: str

    def __str__(self) -> str:
        return f"{self.mean:g}" if self.std is None else f"{self.mean:g} ± {self.std:g}"


def find_runs(folders: Iterable[Path]) -> Iterator[Run]:
    """Reads the runs in and below the folders, each once. Leaves unreadable ones out, with a line on stderr."""
    paths: dict[Path, Path] = {}  # by what they resolve to
    for folder in folders:
        found = sorted(path.parent for path in folder.rglob("args.json"))
        if not folder.is_dir():
            print(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}", file=sys.stderr)
        elif not found:
            print(f"{folder}: no run there, nothing with an args.json", file=sys.stderr)
        paths |= {path.resolve(): path for path in found if path.resolve() not in paths}
    for path in paths.values():
        try:
            yield read_run(path)
        except UNREADABLE as error:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{path} is left out, its args.json or eval.log cannot be read: {reason}", file=sys.stderr)


def read_run(folder: Path) -> Run:
    """Reads a run of this project or the authors' script. Raises one of UNREADABLE if a file is missing or damaged."""
    args = json.loads((folder / "args.json").read_text())
    records = [json.loads(line) for line in (folder / "eval.log").read_text().split("\n")[:-1]]  # complete lines
    repeat = int(args["action_repeat"])  # environment steps per step; the authors log steps only
    returns = np.array([float(record["episode_reward"]) for record in records])
    steps = np.array([float(each.get("environment_steps", each.get("step", np.nan) * repeat)) for each in records])
    if not len(steps) or (np.diff(steps) <= 0).any() or not np.isfinite([steps, returns]).all():
        raise ValueError("there are no evaluations, their steps do not rise, or a number is not finite")
    task = f"{args['domain_name']}_{args['task_name']}"
    method = METHODS[args["encoder_type"], args["decoder_type"]]
    return Run(folder, task, method, int(args["seed"]), steps, returns, int(args["eval_freq"]) * repeat, args)


def read_published(path: Path) -> list[Score]:
    """Reads published scores. Raises one of UNREADABLE if the file is missing or damaged."""
    scores = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file, restval=""):
            steps, mean, std = int(row["environment_steps"]), float(row["mean_return"]), row["std"]
            scores.append(Score(row["task"], row["method"], steps, mean, float(std) if std else None, row["source"]))
    return scores


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
            for run in group:
                axis.plot(run.steps, run.returns, color=colour, alpha=0.25, linewidth=0.8)
            grid, means = curve(group)
            axis.plot(grid, means[:, 0], line, marker=marker, ms=3, color=colour, label=f"{method}, here (mean, 95 %)")
            axis.fill_between(grid, means[:, 1], means[:, 2], color=colour, alpha=0.2, linewidth=0)
            end = 1.25 * max(run.steps[-1] for run in group)
            near = [score for score in published if score[:2] == (task, method) and score.steps <= end]
            points = np.array([(score.steps, score.mean) for score in near if "figure" in score.source])
            if len(points):
                style: dict[str, Any] = {"marker": marker, "ms": 4, "mfc": "white", "linewidth": 0.8, "color": colour}
                axis.plot(*points.T, "--", label=f"{method}, published figure", **style)
            for score in near:
                if "DrQ" in score.source and score.steps in BUDGETS:
                    style = {"fmt": marker, "ms": 6, "capsize": 3, "mec": "black", "color": colour}
                    label = f"{method}, DrQ paper's table"
                    axis.errorbar(score.steps + number * shift, score.mean, score.std, label=label, **style)
        axis.set(title=task.replace("_", " "), xlabel="environment steps", ylabel="return", xlim=(0, None))
        if all((run.returns >= 0).all() for run in shown):  # as in all tasks of the paper
            axis.set_ylim(-20, 1020)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k, 1M
        axis.grid(alpha=0.3)
        legend |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def table(runs: Sequence[Run], published: Sequence[Score]) -> Iterator[Sequence[str]]:
    """Yields names of columns and, for each budget, a row per method and task, then each method's mean over tasks."""
    yield "method", "task", "environment steps", "seeds", "return", "deviation", "95 %", "published"
    known = {(score.method, score.task, score.steps): str(score) for score in published if "DrQ" in score.source}
    for budget in BUDGETS:
        scores = {key: scores_at(group, budget) for key, group in grouped(runs).items()}
        entries = [(*key, [sample], known.get((*key, budget), "not published")) for key, sample in scores.items()]
        for method in sorted({run.method for run in runs}):
            samples = [sample for key, sample in scores.items() if key[0] == method]
            # An interquartile mean needs four scores. Only equal numbers of seeds give tasks equal weights.
            if len(samples) > 1 and sum(map(len, samples)) >= 4 and len({*map(len, samples)}) == 1:
                entries.append((method, f"interquartile mean of {len(samples)} tasks", samples, "not published"))
        for method, name, samples, text in entries:
            seeds = len(samples[0])
            mean, low, high = estimate(samples) if seeds else (np.nan,) * 3
            value = f"{mean:.1f}" if seeds else "not reached"
            deviation = f"{np.std(samples[0], ddof=1):.1f}" if seeds > 1 and len(samples) == 1 else ""
            interval = f"{low:.1f} to {high:.1f}" if seeds > 1 else ""
            yield method, name, f"{budget}", f"{seeds}", value, deviation, interval, text


def outputs(runs: Sequence[Run], published: Sequence[Score]) -> dict[str, bytes]:
    """Returns the contents of FILES, by name."""
    figure, png, svg = draw(runs, published), io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    figure.savefig(svg, format="svg", metadata={"Date": None})
    scores = list(table(runs, published))
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in [scores[0], ["---"] * len(scores[0]), *scores[1:]])
    contents = {"curves.png": png.getvalue(), "curves.svg": svg.getvalue(), "scores.md": markdown.encode()}
    evaluations: list[Sequence[Any]] = [("task", "method", "seed", "environment steps", "return")]
    for run in runs:
        about = (run.task, run.method, run.seed)
        evaluations += [(*about, f"{step:.0f}", value) for step, value in zip(run.steps, run.returns, strict=True)]
    for name, rows in {"scores.csv": scores, "evaluations.csv": evaluations}.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        contents[name] = text.getvalue().encode()
    return contents


def is_own(path: Path) -> bool:
    """Whether this program wrote the file and nobody changed it: its checksum is in `.plot.json` beside it."""
    try:
        return zlib.crc32(path.read_bytes()) in json.loads(path.with_name(CHECKSUMS).read_text())[path.name]
    except UNREADABLE:
        return False


def write(out: Path, contents: dict[str, bytes]) -> None:
    """Writes each file atomically, or raises OSError. Checksums, old and new, come first: a kill does no harm."""
    old = {name: [zlib.crc32((out / name).read_bytes())] if (out / name).exists() else [] for name in contents}
    sums = {name: [*old[name], zlib.crc32(content)] for name, content in contents.items()}
    for name, content in {CHECKSUMS: json.dumps(sums).encode() + b"\n", **contents}.items():
        temporary = out / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(content)
        temporary.replace(out / name)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=user_path, help="work_dirs of runs, or folders that contain them")
    parser.add_argument("--out", type=user_path, default="plots", help="folder for the figure and the tables")
    parser.add_argument("--published", type=user_path, default=str(PUBLISHED), help="CSV file of published scores")
    args = parser.parse_args(argv)
    out, path = Path(args.out), Path(args.published)
    try:
        published = read_published(path)
    except UNREADABLE as error:
        parser.error(f"{path} cannot be read as published scores: {error}")
    runs = list(find_runs(map(Path, args.folders)))
    if not runs:
        parser.error("there is no run to draw")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out} cannot be made: {error.strerror}")
    if others := [name for name in FILES if os.path.lexists(out / name) and not is_own(out / name)]:
        parser.error(f"--out {out} holds other files, or changed ones ({', '.join(others)}): choose another folder")
    print("".join(f"{line}\n" for line in notes(runs)), file=sys.stderr, end="")
    contents = outputs(runs, published)
    try:
        write(out, contents)
    except OSError as error:
        parser.error(f"--out {out} cannot be written: {error.strerror}")
    print(contents["scores.md"].decode(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
