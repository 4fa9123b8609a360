"""ebm doctor: what it says of this machine, of a real run, and of what was done to it."""

import gc
import json
import logging

import torch
from runs import TINY

from ebm.__main__ import main


def doctor(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["doctor", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def train(run, digits, **settings) -> int:
    values = TINY | {"run.dir": run, "data.shards": digits, "train.steps": 4, "checkpoint.every": 2}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    code = main(["train", *(f"{key}={value}" for key, value in values.items())])
    gc.collect()  # lets a failed run's lock go
    logging.getLogger("ebm").handlers.clear()
    return code


def test_the_machine(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    said = doctor(capsys)
    assert f"torch {torch.__version__.partition('+')[0]}" in said and "W&B: offline" in said and "GB free at" in said
    assert "secret" not in said
    assert main(["doctor", "/dev"]) == 4 and "no run directory" in capsys.readouterr().err


def test_a_run(tmp_path, digits, capsys):
    run = tmp_path / "run"
    assert train(run, digits, train__time_limit=0.001) == 75
    said = doctor(capsys, run)
    assert "conv energy of (1, 8, 8) by contrastive" in said and "newest checkpoint at step" in said
    assert f"go on: accelerate launch train.py --config {run}/config.yaml" in said
    assert train(run, digits) == 0
    assert train(run, digits, train__steps=6, train__extend="true") == 0
    said = doctor(capsys, run)
    assert "step 6 of 6 (100%)" in said and "train.steps=12 train.extend=true" in said and f"ebm report {run}" in said
    assert "changed at step 4: train.steps 4 -> 6" in said and "3 starts" in said

    newest = max((run / "checkpoints").glob("step_????????"))
    (newest / "ema.safetensors").write_bytes(b"")
    sick = {"step": 6, "health/warning": 2.5, "data/skipped": 3.0, "sampler/saturated": 0.9, "data/saturated": 0.1}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(sick) + "\n" + '{"step": 7, "torn')
    (run / "DONE").unlink()
    (run / "attempts.json").write_text(json.dumps({"step": 4, "starts": 5, "reason": "out of memory"}))
    said = doctor(capsys, run)
    for words in (f"checkpoint {newest.name} is damaged", "health/warning is 2.5", "3 samples were passed over",
                  "0.80 more pixels at the bounds", "out of memory", "5 starts in a row"):  # fmt: skip
        assert words in said, said
