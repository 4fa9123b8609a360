"""Where a training step's time goes: data, draw, fold, chain, loss, optimizer, write and log, and the overhead; and how
long the loss takes as a CUDA graph and without.

python benchmarks/step.py [--config FILE] [--steps 200] [--out FILE] [key=value ...]

Runs the trainer's own step on the config (digits by default), in up to four rounds: some steps with a clock around
each of their parts, then four times as many without, issued as a run issues them. A clock makes a GPU wait after each
part, so the parts add up to more than a step there. Prints a table and one JSON object: the median of each part, the
seconds of a step without clocks, and the overhead, step / (chain + loss). Where the loss is a CUDA graph, a tenth as
many steps without it follow.
"""

import argparse
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ebm.runtime.process import prepare_process

prepare_process()

from timing import machine, publish, seconds, spread, table  # noqa: E402

from ebm.config import load_config  # noqa: E402
from ebm.data.shards import ensure_shards  # noqa: E402
from ebm.runtime.distributed import World  # noqa: E402
from ebm.training import step as training_step  # noqa: E402
from ebm.training.state import build_state  # noqa: E402

PARTS = ("data", "draw", "fold", "chain", "loss", "optimizer", "write", "log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    ensure_shards(config.data.shards, config.data.source, "train")
    state = build_state(config, World(config.train))
    rounds = timed_steps(state, options.steps, warm=10)
    times = {part: [t for one in rounds for t in one.parts[part]] for part in PARTS}
    total = sum(map(median, times.values()))
    result = {
        "machine": machine(),
        "config": " ".join([str(options.config or "digits"), *options.overrides]),
        "step_s": spread([one.step for one in rounds]),
        "parts_s": {part: spread(values, 6) for part, values in times.items()},
        "shares": {part: round(median(values) / total, 4) for part, values in times.items()},
        "over_chain_and_loss": spread([one.step / (one.median("chain") + one.median("loss")) for one in rounds], 3),
        "loss_captured": state.loss.captured is not None,
    }
    if state.loss.captured is not None:
        state.loss.capture = state.loss.captured = None
        rounds = timed_steps(state, max(options.steps // 10, 8), warm=4)
        result["loss_eager_s"] = spread([t for one in rounds for t in one.parts["loss"]], 6)
        result["step_loss_eager_s"] = spread([one.step for one in rounds])
    state.reader.close()
    rows = [[part, 1e3 * median(values), f"{median(values) / total:.1%}"] for part, values in times.items()]
    print(table(["part", "ms", "share"], rows))
    publish(result, options.out)


@dataclass
class Round:
    """Steps with clocks, then steps without."""

    parts: dict[str, list[float]]  # seconds of each step with clocks
    step: float  # seconds of a step without

    def median(self, part: str) -> float:
        return median(self.parts[part])


def timed_steps(state, number: int, warm: int) -> list[Round]:
    """About `number` steps in up to four rounds, a fifth of each with clocks, after `warm` steps."""

    def steps(count: int) -> None:
        for _ in range(count):
            training_step.train_step(state, next(state.reader))

    steps(warm)
    with_clocks, rounds = max(number // 20, 1), []
    for _ in range(min(4, number // 2)):
        parts = defaultdict(list)
        for _ in range(with_clocks):
            batch = []
            parts["data"].append(seconds(lambda batch=batch: batch.append(next(state.reader))))
            with clocks(state) as clocked:
                training_step.train_step(state, batch[0])
            for part in PARTS[1:]:
                parts[part].append(clocked[part])
        rounds.append(Round(parts, seconds(lambda: steps(4 * with_clocks)) / (4 * with_clocks)))
    return rounds


@contextmanager
def clocks(state):
    """A clock around each part of the step; gives the seconds each took."""
    parts = defaultdict(float)
    places = [
        (training_step, "positives", "draw"), (training_step, "initial_states", "draw"),
        (state, "fold", "fold"),
        (state, "engine", "chain"), (state, "loss", "loss"),
        (training_step, "clip_grad_norm", "optimizer"), (training_step, "step_if", "optimizer"),
        (state.optimizer, "zero_grad", "optimizer"), (training_step, "update_average", "optimizer"),
        (state.meters, "add", "log"),
    ]  # fmt: skip
    if state.buffer is not None:
        places.append((state.buffer, "write", "write"))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for (owner, name, original), (_, _, part) in zip(originals, places, strict=True):

        def clocked(*args, _original=original, _part=part, **kwargs):
            out = []
            parts[_part] += seconds(lambda: out.append(_original(*args, **kwargs)))
            return out[0]

        setattr(owner, name, clocked)
    try:
        yield parts
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
