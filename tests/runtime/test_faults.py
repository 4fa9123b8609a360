"""Real runs of two ranks under real faults: the same command goes on, and nothing is lost.

EBM_KILLS and EBM_STOPS set how many kills and stops (the acceptance figures are measured with 60 and 10).
"""

import json
import os
import random
import shutil
import signal
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from runs import Run, command, final_hashes, finish, free_port, last_step, records

from ebm.runtime import checkpoint
from ebm.runtime.distributed import World
from ebm.runtime.run_directory import RunDirectory

SETTINGS = {"train__steps": 120, "sampler__num_steps": 5, "health__max_restarts": 1000}
KILLS, STOPS = int(os.environ.get("EBM_KILLS", "4")), int(os.environ.get("EBM_STOPS", "2"))


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The uninterrupted run of two ranks."""
    path = tmp_path_factory.mktemp("whole")
    finish(command(2, path / "run", digits, **SETTINGS), path / "log")
    return path / "run"


def same(run_dir, whole) -> bool:
    assert final_hashes(run_dir) == final_hashes(whole)
    assert (run_dir / "trace.jsonl").read_bytes() == (whole / "trace.jsonl").read_bytes()
    assert [r["step"] for r in records(run_dir / "metrics.jsonl")] == list(range(1, SETTINGS["train__steps"] + 1))
    return True


def test_killed_at_seeded_points(digits, whole, tmp_path):
    """A quarter of the kills inside a save, at its file operations; half of those, and of the others, on one rank."""
    rng, run_dir, inside, kills = random.Random(0), tmp_path / "run", 0, 0
    while kills < KILLS:
        in_save, all_ranks, rank = kills % 4 == 0, kills % 8 < 4, rng.randrange(2)
        fault = {"kind": "kill_in_save", "rank": rank, "all": all_ranks, "event": rng.randint(1, 30)}
        if in_save:
            arguments = command(2, run_dir, digits, script="tests/faulty.py", **SETTINGS)
            run = Run(arguments, tmp_path / "log", EBM_FAULT=json.dumps(fault))
            if run.wait() == 0:  # no step was left that saves: from the beginning again
                assert same(run_dir, whole)
                shutil.rmtree(run_dir)
                continue
            run.kill()
            inside += 1
        else:
            run = Run(command(2, run_dir, digits, **SETTINGS), tmp_path / "log")
            if not run.until_step(run_dir, last_step(run_dir) + rng.randint(1, 15)):
                assert run.wait() == 0 and same(run_dir, whole)
                shutil.rmtree(run_dir)
                continue
            if all_ranks:
                run.kill()
            else:
                os.kill(run.ranks()[rank], signal.SIGKILL)
                assert run.wait(60) != 0
                run.kill()
        kills += 1
    finish(command(2, run_dir, digits, **SETTINGS), tmp_path / "log")
    assert same(run_dir, whole)
    assert inside >= KILLS // 4


def test_sigterm_loses_no_step(digits, whole, tmp_path):
    """To the launcher, at seeded steps: each start goes on at the very step at which the one before it stopped."""
    rng, run_dir, stops, step = random.Random(1), tmp_path / "run", 0, 0
    while stops < STOPS:
        run = Run(command(2, run_dir, digits, **SETTINGS), tmp_path / f"log{stops}")
        if not run.until_step(run_dir, step + rng.randint(1, 20)):
            assert run.wait() == 0 and same(run_dir, whole)
            shutil.rmtree(run_dir)
            step = 0
            continue
        run.process.send_signal(signal.SIGTERM)
        run.wait()
        if (run_dir / "DONE").exists():
            continue
        said = run.log.read_text()
        assert "stopping at step" in said and (step == 0 or f"resuming {run_dir} at step {step}" in said)
        stops, step = stops + 1, last_step(run_dir)
        assert checkpoint.checkpoints(run_dir / "checkpoints")[-1].name == f"step_{step:08d}"
    finish(command(2, run_dir, digits, **SETTINGS), tmp_path / "log")
    assert same(run_dir, whole)


@pytest.mark.slow
def test_two_one_four_two_ranks(digits, tmp_path):
    """No chain lost or copied, one order: the trace is that of one uninterrupted rank."""
    settings = SETTINGS | {"data__streams": 4}
    finish(command(1, tmp_path / "whole", digits, **settings), tmp_path / "log")
    for ranks, step in ((2, 20), (1, 50), (4, 80)):
        run = Run(command(ranks, tmp_path / "run", digits, **settings), tmp_path / "log")
        assert run.until_step(tmp_path / "run", step)
        (tmp_path / "run/STOP").touch()
        run.wait()
    finish(command(2, tmp_path / "run", digits, **settings), tmp_path / "log")
    assert (tmp_path / "run/trace.jsonl").read_bytes() == (tmp_path / "whole/trace.jsonl").read_bytes()
    newest, other = (checkpoint.checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("run", "whole"))
    for stream in range(4):
        ages = [checkpoint.read_tensors(path, f"stream_{stream:04d}")["age"] for path in (newest, other)]
        assert ages[0].equal(ages[1])


@pytest.mark.parametrize("how", ["asleep", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_ends_the_job_with_stacks(digits, tmp_path, how):
    """Asleep: every rank shows where it stands. Stopped by SIGSTOP: it can't, but the job ends all the same."""
    settings = SETTINGS | {"train__collective_timeout": 8}
    if how == "asleep":
        fault = {"kind": "hang", "rank": 1, "step": 15}
        arguments = command(2, tmp_path / "run", digits, script="tests/faulty.py", **settings)
        run = Run(arguments, tmp_path / "log", EBM_FAULT=json.dumps(fault))
    else:
        run = Run(command(2, tmp_path / "run", digits, **settings), tmp_path / "log")
        assert run.until_step(tmp_path / "run", 15)
        os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.wait(90) == 1
    run.kill()
    said = run.log.read_text()
    assert "rank 0: no step in 8 s" in said and "ebm/training/loop.py" in said
    if how == "asleep":
        assert "rank 1: no step in 8 s" in said and "in hang" in said
    finish(command(2, tmp_path / "run", digits, **SETTINGS), tmp_path / "log")


def test_a_lost_rank_is_known_by_what_gloo_says():
    """By the operation that times out, by another under way then, and by one after it."""
    torch.multiprocessing.spawn(wait_for_a_rank_that_sleeps, (free_port(),), nprocs=2)


def wait_for_a_rank_that_sleeps(rank: int, port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=2), rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        time.sleep(4)
        os._exit(0)
    first = dist.all_reduce(torch.ones(1), async_op=True)
    for wait in (lambda: dist.all_reduce(torch.ones(1)), first.wait, lambda: dist.all_reduce(torch.ones(1))):
        with pytest.raises(RuntimeError) as caught:
            wait()
        assert World.lost_peer(SimpleNamespace(size=2), caught.value), caught.value
    os._exit(0)  # gloo's threads still hold what timed out: the interpreter's own end may abort


def test_a_failing_step_is_not_retried_for_ever(digits, tmp_path):
    """It fails while the checkpoint before it is being written, which is made final all the same."""
    settings = SETTINGS | {"health__max_restarts": 1}
    fault = json.dumps({"kind": "raise", "rank": 0, "step": 11})
    for _ in range(4):  # from 0, from 10, from 10 again, refused
        run = Run(command(1, tmp_path / "run", digits, script="tests/faulty.py", **settings), tmp_path / "log",
                  EBM_FAULT=fault)  # fmt: skip
        assert run.wait() != 0
    said = run.log.read_text()
    assert said.count("RuntimeError: injected at step 11") >= 3
    assert "2 starts at step 10 ended without a newer checkpoint (health.max_restarts=1)" in said
    assert "The last one said: RuntimeError: injected at step 11" in said
    finish(command(1, tmp_path / "run", digits, **SETTINGS), tmp_path / "log")  # a higher limit lets it go on


NAN = {"train__steps": 80, "checkpoint__every": 10, "health__every": 5, "health__patience": 2}


@pytest.mark.parametrize("kind", ["nan_weight", "nan_chain"])
def test_a_nan_on_one_rank(digits, tmp_path, kind):
    """In a weight: both ranks go back to the last good checkpoint, with new noise and the same data; a job killed
    right then resumes as if it had not been. In a chain: it starts again, and no more than the step is lost."""
    fault = json.dumps({"kind": kind, "rank": 1, "step": 43})
    finish(command(2, tmp_path / "sound", digits, **NAN), tmp_path / "log")

    def arguments(name):
        return command(2, tmp_path / name, digits, script="tests/faulty.py", **NAN)

    said = finish(arguments("run"), tmp_path / "log", EBM_FAULT=fault)
    last = records(tmp_path / "run/metrics.jsonl")[-1]
    ours, theirs = (records(tmp_path / name / "trace.jsonl") for name in ("run", "sound"))
    assert [r["samples"] for r in ours] == [r["samples"] for r in theirs]
    if kind == "nan_chain":
        assert [last[f"health/{name}"] for name in ("reset_chains", "skipped_steps", "rollbacks")] == [1, 1, 0]
        assert ours == theirs
        return
    assert "diverged at step 45: the ranks' weights differ or are not finite" in said
    assert "back to step 40 with new noise, learning rate x 1, step size x 1" in said
    assert last["health/rollbacks"] == 1 and ours[:40] == theirs[:40]
    assert all(a["chains"] != b["chains"] for a, b in zip(ours[40:], theirs[40:], strict=True))
    assert [r["step"] for r in records(tmp_path / "run/metrics.jsonl")] == list(range(1, 81))

    run = Run(arguments("killed"), tmp_path / "log2", EBM_FAULT=fault)
    while not (tmp_path / "killed/rollbacks.json").exists():
        assert run.process.poll() is None
    run.kill()
    said = finish(arguments("killed"), tmp_path / "log2", EBM_FAULT=fault)
    assert final_hashes(tmp_path / "killed") == final_hashes(tmp_path / "run")
    assert (tmp_path / "killed/trace.jsonl").read_bytes() == (tmp_path / "run/trace.jsonl").read_bytes()


def test_without_the_ladder_a_nan_is_the_end(digits, tmp_path):
    """With exit code 3. The other rank waits until rank 0 has closed its records: the launcher would end it."""
    fault = {"kind": "nan_weight", "rank": 1, "step": 43, "slow_close": str(tmp_path / "closed")}
    arguments = command(2, tmp_path / "run", digits, script="tests/faulty.py", health__ladder="false", **NAN)
    said = finish(arguments, tmp_path / "log", 1, EBM_FAULT=json.dumps(fault))
    assert "error: training diverged at step 45: the ranks' weights differ or are not finite" in said
    assert "exitcode  : 3" in said
    assert (tmp_path / "closed").exists()


def test_every_file_of_the_newest_checkpoint_damaged(digits, tmp_path, shown):
    """Truncated at 5 places and flipped at 5: always found, said, and the one before is taken."""
    settings = SETTINGS | {"train__steps": 30, "checkpoint__keep": 3}
    finish(command(2, tmp_path / "run", digits, **settings), tmp_path / "log")
    root = tmp_path / "run/checkpoints"
    older, newest = checkpoint.checkpoints(root)[-2:]
    files, rng = sorted(newest.iterdir()), random.Random(2)
    assert {f.name for f in files} >= {"manifest.json", "state.json", "model.safetensors", "stream_0003.safetensors"}
    cases = 0
    for file in files:
        good = file.read_bytes()
        places = [0, 1, len(good) // 2, len(good) - 1, rng.randrange(len(good))]
        for damaged in [good[:at] for at in places] + [_flipped(good, at, rng) for at in places]:
            file.write_bytes(damaged)
            assert checkpoint.newest_valid(root) == older, f"{file.name}, {len(damaged)} bytes"
            assert str(newest) in shown()
            cases += 1
        file.write_bytes(good)
    assert checkpoint.newest_valid(root) == newest and cases == 10 * len(files)

    newest_model = newest / "model.safetensors"
    newest_model.write_bytes(newest_model.read_bytes()[:-1])
    (tmp_path / "run/DONE").unlink()
    whole = final_hashes(tmp_path / "run")
    said = finish(command(2, tmp_path / "run", digits, **settings), tmp_path / "log")
    assert "is damaged ('model.safetensors' has" in said and "at step 20" in said
    assert final_hashes(tmp_path / "run") == whole
    assert checkpoint.problem_of(newest) is None


def _flipped(data: bytes, at: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_one_job_a_run_directory(tmp_path, monkeypatch, shown):
    from ebm.config import load_config
    from ebm.errors import ConfigError

    config = load_config(None, [f"run.dir={tmp_path / 'run'}"])
    monkeypatch.setattr("ebm.runtime.run_directory.LOCK_WAIT", 1.0)
    world = World(config.train)
    first = RunDirectory(config, world)
    with pytest.raises(ConfigError, match="is used by another process"):
        RunDirectory(config, world)
    assert "waiting up to" in shown()
    first._locked.close()
    RunDirectory(config, world)
