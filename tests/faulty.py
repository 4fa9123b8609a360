"""train.py with a fault injected, for tests: EBM_FAULT='{"kind": ..., "rank": ..., ...}' in the environment.

kinds, each on one rank (or on all: "rank": null):
    kill_in_save: SIGKILL at the `event`-th file operation inside checkpoints/; with "all" the whole job dies
    raise, hang: an error, or a sleep without end, before step `step`
    lost_data: a DataError before step `step`, while leaving the group of ranks would take for ever
    slow_source: shards take `seconds` to be written
    slow_close (a file, beside any kind): rank 0 takes 3 s to close its records, and writes the file then
    nan_weight, nan_chain: a NaN in the first weight, or in a chain, before step `step`, until a rollback
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ebm.__main__ import main
from ebm.data import shards
from ebm.errors import DataError
from ebm.training import loop as trainer

FAULT = json.loads(os.environ["EBM_FAULT"])
HERE = FAULT.get("rank") in (None, int(os.environ.get("RANK", "0")))
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def kill_in_save() -> None:
    left = [FAULT["event"]]

    def on_event(name: str, arguments: tuple) -> None:
        if name in FILE_EVENTS and "checkpoints/step_" in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL) if FAULT["all"] else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def before_step(action) -> None:
    real = trainer.train_step

    def train_step(state, batch):
        if state.step + 1 == FAULT["step"] and state.divergence.rollbacks == 0:
            action(state)
        return real(state, batch)

    trainer.train_step = train_step


def fail(state) -> None:
    raise RuntimeError(f"injected at step {state.step + 1}")


def lost_data(state) -> None:
    torch.distributed.destroy_process_group = lambda *_: time.sleep(3600)
    raise DataError(f"shard lost at step {state.step + 1}")


def slow_source() -> None:
    real = shards.ensure_shards
    shards.ensure_shards = lambda *arguments: (time.sleep(FAULT["seconds"]), real(*arguments))


def slow_close() -> None:
    real = trainer.Tracker.close
    trainer.Tracker.close = lambda *arguments: (time.sleep(3), real(*arguments), Path(FAULT["slow_close"]).touch())


def hang(state) -> None:
    time.sleep(3600)


@torch.no_grad()
def nan_weight(state) -> None:
    next(state.energy.parameters()).view(-1)[0] = float("nan")


def nan_chain(state) -> None:
    state.buffer.x[0, 0, 0, 0] = float("nan")


if __name__ == "__main__":
    if "slow_close" in FAULT:
        slow_close()
    if HERE and FAULT["kind"] == "kill_in_save":
        kill_in_save()
    elif FAULT["kind"] == "slow_source":
        slow_source()
    elif HERE:
        before_step({"raise": fail}.get(FAULT["kind"]) or globals()[FAULT["kind"]])
    sys.exit(main(["train", *sys.argv[1:]]))
