"""python -m ebm evaluate RUN [--metrics frechet,classes,ood,energy,density,accuracy,likelihood] [--json FILE]"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ebm import evaluation
from ebm.commands import add_device, add_weights
from ebm.commands.doctor import last_metrics
from ebm.config import load_config
from ebm.data.sources import known_density
from ebm.errors import ConfigError
from ebm.evaluation.classifier import default_ruler_directory
from ebm.evaluation.measures import MADE_UP, MEASURES, OF_SOME_RUNS, Metrics, measure_ood, problem_with
from ebm.evaluation.sets import MOST, Sets
from ebm.inference.images import grid, landscape, side_by_side, to_png
from ebm.inference.inputs import read_states
from ebm.inference.run import open_run
from ebm.report.page import draw_lengths, pixels
from ebm.runtime.files import replace
from ebm.runtime.run_directory import reserved
from ebm.tracking.delivery import add_evaluation
from ebm.tracking.wandb_run import send_evaluation

METRICS = ("frechet", "classes", "ood", "energy", "density", "accuracy", "likelihood")
SHOWN = 36  # chains of each length in the picture
NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it")
    parser.add_argument("--metrics", help=f"some of {','.join(METRICS)} (default: all that the run supports)")
    parser.add_argument("--json", metavar="FILE", help="write the values to this file as one object")
    parser.add_argument(
        "--log",
        action="store_true",
        help="send the values to the run's W&B run, at the checkpoint's step (offline: into a part for ebm sync)",
    )
    parser.add_argument("--num", type=int, default=2000, help="fresh chains (default 2000)")
    parser.add_argument("--steps", type=int, default=200, help="steps of a fresh chain (default 200)")
    parser.add_argument(
        "--lengths",
        metavar="K,K,...",
        help="also compare fresh chains of these numbers of steps, such as 10,100,1000,10000: length/K",
    )
    parser.add_argument(
        "--ood",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="further outliers: shards, a folder, FILE.npy, or a source such as mnist; may stand several times",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of fresh chains and made-up images (default 0)")
    parser.add_argument(
        "--max-samples", type=int, default=MOST, metavar="N", help=f"of each set of data and chains (default {MOST})"
    )
    parser.add_argument(
        "--ruler",
        metavar="DIR",
        help="where the classifier that distances are measured with is kept, once a data set, such as the directory of "
        "its shards, which is looked into first (default: ~/.cache/ebm/rulers)",
    )
    add_device(parser)
    add_weights(parser)


def run(arguments: argparse.Namespace) -> int:
    names, lengths, places = _checked(arguments)
    trained = open_run(arguments.run, arguments.device, arguments.weights)
    progress = Progress(arguments.num, [arguments.steps, *lengths])
    sets = Sets(
        trained,
        num=arguments.num,
        steps=arguments.steps,
        lengths=lengths,
        seed=arguments.seed,
        most=arguments.max_samples,
        ruler_directory=Path(arguments.ruler) if arguments.ruler else default_ruler_directory(),
        moved=progress.moved,
    )
    outliers = {name: read_states(place, trained.config, most=sets.most)[0] for name, place in places.items()}
    values: Metrics = {}
    words: list[str] = []
    asked = {"lengths": bool(lengths), "ood": bool(places)}
    for name in (*names, *(["lengths"] if lengths else [])):
        problem = problem_with(name, sets)
        if problem is None:
            found = measure_ood(sets, outliers) if name == "ood" else MEASURES[name](sets)
            values |= found.values
            words += found.words
        elif arguments.metrics is not None or asked.get(name):
            raise problem
        elif name not in OF_SOME_RUNS:
            words.append(f"{name}: left out: {problem}")
    progress.close()
    if arguments.json:
        _write(Path(arguments.json), values)
    settings = {"num": sets.num, "steps": sets.steps, "weights": arguments.weights}
    words += _keep(sets, values, settings)
    if arguments.log:
        with reserved(trained.directory):
            last = last_metrics(trained.directory / "metrics.jsonl").get("step", 0)
            config = load_config(trained.directory / "config.yaml")  # as it was given, without the steps in use
            words.append(send_evaluation(config, trained.directory, trained.checkpoint, _finite(values), int(last)))
    print(f"{trained.checkpoint}: {sets}")
    if "comparison" in sets.__dict__:
        print(f"distances: of {sets.comparison.images} images each, in features of ruler {sets.ruler.identity}")
    print(table(values))
    for word in words:
        print(word)
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[tuple[str, ...], list[int], dict[str, str]]:
    """Metrics, lengths, places of outliers by name. Raises ConfigError."""
    names = METRICS if arguments.metrics is None else tuple(arguments.metrics.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"--metrics {arguments.metrics}: {unknown[0]!r} is none of {', '.join(METRICS)}")
    if arguments.num < 2 or arguments.steps < 1 or arguments.max_samples < 2:
        raise ConfigError(
            f"--num {arguments.num} and --max-samples {arguments.max_samples} must be at least 2, and "
            f"--steps {arguments.steps} at least 1"
        )
    try:
        lengths = sorted({int(part) for part in arguments.lengths.split(",")}) if arguments.lengths else []
    except ValueError:
        lengths = [0]
    if lengths and lengths[0] < 1:
        raise ConfigError(f"--lengths {arguments.lengths}: must be numbers of steps of 1 or more, such as 10,100,1000")
    places: dict[str, str] = {}
    for item in arguments.ood:
        name, found, place = item.partition("=")
        if not found or not place or not NAME.fullmatch(name) or name in (*places, *MADE_UP):
            raise ConfigError(
                f"--ood {item}: must be NAME=SOURCE with a name of letters and digits, a new one, such as mnist=mnist"
            )
        places[name] = place
    if places and "ood" not in names:
        raise ConfigError(f"--ood {arguments.ood[0]}: goes with the metric ood; add it to --metrics")
    return names, lengths, places


class Progress:
    """How far the chains are: a bar on a terminal, elsewhere one line with an estimate. Nothing for quick ones."""

    def __init__(self, num: int, lengths: list[int]):
        self.total, self.done, self.started = num * max(lengths), 0, time.monotonic()
        self.bar, self.told = None, False

    def moved(self, steps: int) -> None:
        self.done += steps
        seconds = time.monotonic() - self.started
        left = seconds * max(self.total - self.done, 0) / self.done
        if self.bar is not None:
            self.bar.update(min(steps, self.bar.total - self.bar.n))
        elif seconds + left > 5 and not self.told:
            self.told = True
            if sys.stderr.isatty():
                self.bar = tqdm(total=self.total, initial=self.done, desc="fresh chains", unit="step", unit_scale=True)
            else:
                print(f"fresh chains: about {left:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def table(values: Metrics) -> str:
    """A line a value, with its interval; the shares of the classes, of which there are many, on one line a set, in
    per cent."""
    lines: dict[str, str] = {}
    shares: dict[str, list[str]] = {}
    for key, value in values.items():
        name, is_share, _ = key.partition("_share_")
        if is_share:
            shares.setdefault(f"{name}_shares (%)", []).append(f"{100 * float(value):.1f}")
        elif not (key.endswith(("_low", "_high")) and key.rpartition("_")[0] in values):
            lines[key] = f"{_shown(value):>10}"
            if f"{key}_low" in values:
                lines[key] += f"  [{_shown(values[f'{key}_low'])}, {_shown(values[f'{key}_high'])}]"
    width = max(map(len, [*lines, *shares]), default=0)
    return "\n".join(
        [f"{key:<{width}}  {value}" for key, value in lines.items()]
        + [f"{key:<{width}}  {' '.join(row)}" for key, row in shares.items()]
    )


def _shown(value: float | str) -> str:
    return str(value) if isinstance(value, int | str) else f"{value:.4f}"


def _write(file: Path, values: Metrics) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_json(_finite(values)))
    except OSError as error:
        raise ConfigError(f"--json {file}: {error}") from error


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _finite(values: Metrics) -> Metrics:
    """Without numbers that JSON has no way to write."""
    return {key: value for key, value in values.items() if isinstance(value, str) or math.isfinite(value)}


def _keep(sets: Sets, values: Metrics, settings: dict[str, Any]) -> list[str]:
    """Keep in the run directory what the report shows: evaluation.json, a line of evaluations.jsonl, and pictures. Says
    so; a directory of another user's that can't be written to is left as it is."""
    run, said = sets.run, []
    record = {"step": run.step, "num": sets.num, "lengths": sets.lengths, "values": _finite(values)}
    files = {"evaluation.json": _json(record).encode()}
    if any(key.startswith("length/") for key in values):
        files["lengths.png"] = to_png(_of_lengths(sets, values))
        said.append(f"distances and chains of each length -> {run.directory / 'lengths.png'}")
    if "likelihood/kl" in values:
        files["landscape.png"] = to_png(_landscape(sets))
        said.append(f"the true density, the learned one, and fresh chains -> {run.directory / 'landscape.png'}")
    try:
        for name, content in files.items():
            replace(run.directory / name, content)
        add_evaluation(run.directory, {"step": run.step, "settings": settings, "values": _finite(values)})
    except OSError as error:
        return [f"{run.directory} can't be written to ({error.strerror}): nothing is kept there for the report"]
    return said


def _of_lengths(sets: Sets, values: Metrics) -> np.ndarray:
    """The distances against the length, and the chains of each length; below it, where chains keep the noise of the
    data, the same chains denoised."""
    chains = {f"{length} steps": sets.of_lengths[0][length][:SHOWN] for length in sets.lengths}
    points = np.array([(length, values[f"length/{length}"]) for length in sets.lengths], dtype=float)
    ends = {end: [float(values[f"length/{length}_{end}"]) for length in sets.lengths] for end in ("low", "high")}
    curve = pixels(lambda ax: draw_lengths(ax, points, **ends), (3.2, 2.6))
    rows = [{"distance in floors": curve, **{title: grid(x) for title, x in chains.items()}}]
    if sets.noise:
        denoised = {f"{title}, denoised": grid(sets.run.denoised(x)) for title, x in chains.items()}
        rows.append({"": np.full_like(curve, 255), **denoised})
    return np.concatenate([np.asarray(side_by_side(row)) for row in rows])


def _landscape(sets: Sets, half_width: float = 6.0) -> np.ndarray:
    """The true density, the learned one, and fresh chains on it."""
    energy, _ = known_density(str(sets.run.config.data.source))
    true = evaluation.density(energy, 1.0, half_width)
    learned = evaluation.density(sets.energies, sets.run.temperature, half_width)
    panels = {"true": (true, None), "learned": (learned, None), "chains": (learned, sets.fresh.numpy())}
    return landscape({name: (d.energies, x) for name, (d, x) in panels.items()}, half_width)
