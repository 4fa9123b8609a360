"""Where a training step's time goes: data, draw, fold, chain, loss, optimizer, write and log, and the overhead; and how
long the loss takes as a CUDA graph and without.

python benchmarks/step.py [--config FILE] [--steps 200] [--out FILE] [key=value ...]

Runs the trainer's own step on the config (digits by default) with a clock around each of its parts, and prints a table
and one JSON object: the median of each part, and the overhead, (step + data) / (chain + loss). Every other step runs
without clocks: they make a GPU wait after each part, so that there the parts add up to more than an unobserved step.
Where the loss is a CUDA graph, a tenth as many steps without it follow.
"""

import argparse
from collections import defaultdict
from contextlib import contextmanager
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
    times, observed, whole = timed_steps(state, options.steps + 20, warm=5)
    over = [t / (c + x) for t, c, x in zip(observed, times["chain"], times["loss"], strict=True)]
    result = {
        "machine": machine(),
        "config": " ".join([str(options.config or "digits"), *options.overrides]),
        "step_s": spread(whole),
        "parts_s": {part: spread(values, 6) for part, values in times.items()},
        "shares": {part: round(sum(values) / sum(observed), 4) for part, values in times.items()},
        "over_chain_and_loss": spread(over, 3),
        "loss_captured": state.loss.captured is not None,
    }
    if state.loss.captured is not None:
        state.loss.capture = state.loss.captured = None
        eager, _, whole_eager = timed_steps(state, options.steps // 10 + 10, warm=2)
        result["loss_eager_s"], result["step_loss_eager_s"] = spread(eager["loss"], 6), spread(whole_eager)
    state.reader.close()
    total = median(observed)
    rows = [[part, 1e3 * median(values), f"{median(values) / total:.1%}"] for part, values in times.items()]
    print(table(["part", "ms", "share"], rows))
    publish(result, options.out)


def timed_steps(state, number: int, warm: int):
    """Runs steps, every other one with clocks. Returns the seconds of each part and the sum by step with clocks, and
    the seconds of each step without; without the first `warm` of either."""
    times, whole, observed = defaultdict(list), [], []
    for step in range(number):
        batch = []
        waited = seconds(lambda batch=batch: batch.append(next(state.reader)))
        if step % 2:
            whole.append(waited + seconds(lambda batch=batch: training_step.train_step(state, batch[0])))
            continue
        with clocks(state) as parts:
            inside = seconds(lambda batch=batch: training_step.train_step(state, batch[0]))
        observed.append(waited + inside)
        for part in PARTS:
            times[part].append(waited if part == "data" else parts[part])
    return {part: values[warm:] for part, values in times.items()}, observed[warm:], whole[warm:]


@contextmanager
def clocks(state):
    """A clock around each part of the step; gives the seconds each took."""
    parts = defaultdict(float)
    places = [
        (training_step, "positives", "draw"), (training_step, "initial_states", "draw"),
        (state.folded, "refresh", "fold"),
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
