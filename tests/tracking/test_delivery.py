"""What W&B lacks of a run is handed over by the next start, and no more; what waits for W&B is bounded in bytes."""

import json
import threading

import numpy as np
import pytest

from ebm.config import load_config
from ebm.tracking import wandb_run
from ebm.tracking.delivery import Handed, rows_between
from ebm.tracking.wandb_run import WandbRun


@pytest.fixture
def handed(tmp_path, monkeypatch):
    monkeypatch.setattr("ebm.tracking.delivery.WRITE_EVERY", 0.0)
    return lambda delay=0.0: Handed(tmp_path, "abc", delay)


def lacking(handed: Handed, until: int) -> list[int]:
    return [step for step in range(1, until + 1) if handed.lacks(step)]


def test_rows_that_were_not_taken_are_lacking_and_no_others(handed, tmp_path):
    first = handed()
    for step in range(1, 21):
        first.miss(step) if step in (5, 6, 7, 12) else first.note(step)
    first.all_safe()
    second = handed()
    assert second.step == 20 and second.first_lacking == 5
    assert lacking(second, 22) == [5, 6, 7, 12, 21, 22]
    for step in (5, 7, 12, 21, 22):  # in order; 6 fails again
        second.note(step) if step != 7 else (second.miss(6), second.note(7))
    second.all_safe()
    assert lacking(handed(), 22) == [6]
    assert (tmp_path / "wandb_step").read_text() == "abc 22 6-6\n"


def test_what_follows_the_last_safe_row_is_lacking(handed):
    """Rows taken just before a kill, and all that fails after the client's service died."""
    first = handed(delay=3600.0)
    for step in (1, 2, 3):
        first.note(step)
    first.miss(4)
    assert lacking(handed(), 4) == [1, 2, 3, 4]


def test_a_rollback_makes_what_follows_lacking(handed):
    first = handed()
    for step in range(1, 31):
        first.miss(step) if step in (8, 25) else first.note(step)
    first.all_safe()
    first.rewind(20)
    assert lacking(handed(), 22) == [8, 21, 22]


def test_intervals_are_bounded(handed, tmp_path):
    first = handed()
    for step in range(1, 2001):
        first.miss(step) if step % 2 else first.note(step)
    first.all_safe()
    assert len((tmp_path / "wandb_step").read_text()) < 2000
    assert set(range(1, 2001, 2)) <= set(lacking(handed(), 2000))


@pytest.mark.parametrize("text", ["", "abc", "abc x", "abc -5", "abc 3 x-y", "abc 3 5", "other 9", "\x00" * 10**6])
def test_a_wandb_step_of_another_kind(handed, tmp_path, text):
    (tmp_path / "wandb_step").write_text(text)
    assert lacking(handed(), 2) == [1, 2]


def test_records_of_another_kind_end_the_rows(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    for other in ("[]", "7", '"step"', "{}", '{"step": "2"}', '{"step": null}', '{"step": 1.5}', "[" * 10**5, "{"):
        metrics.write_text(f'{{"step": 1}}\n{other}\n{{"step": 2}}\n')
        assert [row["step"] for row in rows_between(metrics, 1, 2)] == [1], other


class Client:
    """The part of W&B's client that takes rows, which refuses some of them."""

    def __init__(self, refuses=()):
        self.rows, self.refuses, self.id = [], refuses, "abc"

    def log(self, row):
        if row.get("step") in self.refuses or "bad" in row:
            raise ValueError("refused")
        self.rows.append(row)

    def finish(self, code):
        pass


def start(tmp_path, monkeypatch, client: Client, resume_step: int) -> WandbRun:
    """The W&B side of a run whose client is `client`, started in its thread as ever."""
    run_dir = tmp_path / "run"
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr("ebm.tracking.delivery.WRITE_EVERY", 0.0)

    def init(self):
        self._handed, self._part_ends = Handed(run_dir, "abc", 0.0), float("inf")
        return client

    monkeypatch.setattr(WandbRun, "_init", init)
    monkeypatch.setattr(WandbRun, "_close_part", lambda self, code: (self._note_left_out(), self._handed.all_safe()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = load_config(None, [f"run.dir={run_dir}", "tracking.wandb=offline"])
    return WandbRun(settings, run_dir, resume_step)


def test_a_failing_call_sends_no_row_twice(tmp_path, monkeypatch):
    """A picture, an alert or a row that W&B refuses: the next start hands over the refused row alone."""
    first = Client(refuses=(4,))
    run = start(tmp_path, monkeypatch, first, 0)
    with (tmp_path / "run/metrics.jsonl").open("w") as metrics:
        for step in range(1, 9):
            metrics.write(json.dumps({"step": step}) + "\n")
            run.log(step, {})
            run.log_histograms(step, {"bad": np.zeros(3)})  # there is no such client: fails
    run.finish(1)
    assert [row["step"] for row in first.rows] == [1, 2, 3, 5, 6, 7, 8]
    second = Client()
    start(tmp_path, monkeypatch, second, 8).finish(0)
    assert [row["step"] for row in second.rows] == [4]
    third = Client()
    start(tmp_path, monkeypatch, third, 8).finish(0)
    assert third.rows == []


def test_what_waits_is_bounded_in_bytes_and_pictures_go_first(tmp_path, monkeypatch):
    """While the client does not answer: pictures stop at half of the bound, rows go on to be kept."""
    monkeypatch.setattr(wandb_run, "MAX_BYTES", 4_000_000)
    client = Client()
    run = start(tmp_path, monkeypatch, client, 0)
    answers = threading.Event()
    client.log = lambda row: answers.wait(60)
    run.log(1, {})
    picture = np.zeros((500, 1000), np.uint8)
    for step in range(2, 50):
        run.log_images(step, {"samples/fresh": picture}, {})
        run.log(step, {"train/loss": 0.0})
    assert run._bytes <= 4_000_000
    assert run._left_out >= 40 and run._rows_left_out.empty()
    answers.set()
    run.finish(0)
