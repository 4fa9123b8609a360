"""A run's config and data are those of its checkpoints: what may change, what is refused, how a run is extended, and
how one begins from another. Real runs, a process after the other."""

import gc
import hashlib
import json
import logging
import shutil

import numpy as np
import pytest
from runs import TINY, final_hashes, records
from safetensors.torch import load_file, save_file

from ebm.__main__ import main
from ebm.data.shards import ensure_shards
from ebm.energies import UNetEnergyFunction

SMALL = TINY | {"train.steps": 6, "checkpoint.every": 3, "optim.decay_start": 1, "data.trace": "false"}


@pytest.fixture
def train(tmp_path, digits, capsys):
    """Trains in this process; (exit code, what was said)."""

    def run(name: str, **settings):
        values = SMALL | {"run.dir": tmp_path / name, "data.shards": digits}
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        capsys.readouterr()
        code = main(["train", *(f"{key}={value}" for key, value in values.items() if value is not None)])
        said = capsys.readouterr()
        gc.collect()  # a failed run's lock, which the end of a process would let go
        return code, said.out + said.err

    yield run
    logging.getLogger("ebm").handlers.clear()


def history(run) -> list[dict]:
    return json.loads((run / "config_history.json").read_text())


@pytest.fixture
def other(tmp_path):
    """Shards of as many other pictures of the same size."""
    pictures = np.random.default_rng(0).integers(0, 255, (200, 8, 8, 1), np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    ensure_shards(str(tmp_path / "other"), f"npy:{tmp_path / 'pictures.npy'}", "train")
    return tmp_path / "other"


def test_a_run_is_extended(train, tmp_path):
    """To the same weights, chains and state, bit for bit, as the longer run; finished or not; and its history says."""
    assert train("long", train__steps=12)[0] == 0
    assert train("run")[0] == 0
    code, said = train("run", train__steps=12)
    assert code == 2 and "train.steps: 6 there, 12 now" in said and "train.extend=true" in said
    assert (tmp_path / "run" / "DONE").read_text() == "step 6\n"
    assert train("run", train__steps=12, train__extend="true")[0] == 0
    assert (tmp_path / "run" / "DONE").read_text() == "step 12\n"
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "long")
    assert [r["step"] for r in records(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 13))
    (change,) = history(tmp_path / "run")
    assert change["step"] == 6 and change["changed"] == {"train.steps": [6, 12]}
    assert "done already" in train("run", train__steps=12, train__extend="true")[1]
    assert train("run", train__steps=12)[0] == 0 and len(history(tmp_path / "run")) == 1
    code, said = train("run", train__steps=12, train__extend="true", energy__hidden_dim=8)
    assert code == 2 and "can't change what a run stores (energy.hidden_dim)" in said
    code, said = train("run", train__steps=5, train__extend="true")
    assert code == 2 and "at step 12 already" in said


def test_a_buffer_of_automatic_size(train, tmp_path):
    """6 steps of 2 moves of 64 chains, 2 moves a slot: 384 slots. Its config keeps the word, its checkpoints the size,
    which a resume finds again and which more steps would change."""
    auto = {"buffer__size": "auto", "buffer__age": 2, "checkpoint__every": 3}
    code, said = train("run", **auto, train__time_limit=0.001)
    assert code == 75 and "384 persistent chains (buffer.size=auto): up to 2 steps at the end of the run" in said
    assert "\n  size: auto\n  age: 2\n" in (tmp_path / "run/config.yaml").read_text()
    assert train("run", **auto)[0] == 0 and train("fixed", buffer__size=384)[0] == 0
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "fixed")
    newest = max((tmp_path / "run/checkpoints").glob("step_????????"))
    assert len(load_file(newest / "stream_0000.safetensors")["age"]) == 384 // 4
    assert main(["sample", str(tmp_path / "run"), "--num", "384", "--init", "buffer", "--out", str(tmp_path / "x.npy"),
                 "--steps", "0"]) == 0  # fmt: skip
    code, said = train("run", **auto, train__steps=12, train__extend="true")
    assert code == 2 and "buffer.size: 384 there, 768 now" in said and "give buffer.size=384" in said
    assert train("run", buffer__size=384, train__steps=12, train__extend="true")[0] == 0
    assert history(tmp_path / "run")[0]["changed"] == {"train.steps": [6, 12]}


def test_a_config_binds_from_the_first_step_on(train, tmp_path):
    """A start that failed, or got to no checkpoint, leaves nothing that refuses the corrected command."""
    code, said = train("run", data__shape="3,8,8")
    assert code in (2, 4) and "shape" in said and (tmp_path / "run" / "config.yaml").exists()
    (tmp_path / "run" / "wandb_id").write_text("of-the-failed")
    assert train("run")[0] == 0
    assert not (tmp_path / "run" / "wandb_id").exists()
    assert train("run", optim__lr=0.5)[0] == 2
    *others, last = sorted((tmp_path / "run" / "checkpoints").glob("step_????????"))
    for checkpoint in others:
        shutil.rmtree(checkpoint)
    last.rename(last.with_name("step_00000000"))  # as of a run that was killed before its first checkpoint
    assert train("run", energy__hidden_dim=8)[0] == 0
    assert [r["step"] for r in records(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


def test_a_run_knows_its_data(train, tmp_path, digits, other):
    """Shards may move; other data are refused with both named, unless data.allow_change says so."""
    assert train("run", train__time_limit=0.001)[0] == 75  # stops at a step, with a checkpoint
    stopped = max((tmp_path / "run" / "checkpoints").glob("step_????????"))
    saved = json.loads((stopped / "state.json").read_text())["data"]
    assert saved["name"] == "1437 samples of digits" and len(saved["identity"]) == 64
    code, said = train("run", data__shards=other, data__source="null")
    assert code == 2 and "1437 samples of digits" in said and "200 samples of npy:" in said
    assert "data.allow_change=true" in said
    (tmp_path / "moved").symlink_to(digits)
    assert train("run", data__shards=tmp_path / "moved", train__time_limit=0.001)[0] == 75
    code, said = train("run", data__shards=other, data__source="null", data__allow_change="true")
    assert code == 0, said
    (change,) = history(tmp_path / "run")
    assert change["changed"]["data"][0].startswith("1437 samples of digits")
    newest = max((tmp_path / "run" / "checkpoints").glob("step_????????"))
    assert json.loads((newest / "state.json").read_text())["data"]["name"].startswith("200 samples")


def test_a_run_knows_its_field(train, tmp_path, monkeypatch):
    """A file may move, with train.extend=true, but not change: another field is refused by name, or recorded. A
    function comes from a module where the command runs."""
    field = UNetEnergyFunction(1, 8, 8, (4, 8))
    save_file(field.state_dict(), tmp_path / "v.safetensors")
    settings = {"energy__kind": "unet", "energy__features": "[4,8]", "loss__kind": "equilibrium", "data__noise_std": 0}
    settings |= {"energy__hidden_dim": None, "loss__field": tmp_path / "v.safetensors"}
    assert train("run", **settings, train__time_limit=0.001)[0] == 75
    newest = max((tmp_path / "run/checkpoints").glob("step_????????"))
    assert not any("field" in key for file in newest.glob("*.safetensors") for key in load_file(file))
    save_file({k: 2 * v for k, v in field.state_dict().items()}, tmp_path / "v.safetensors")
    code, said = train("run", **settings)
    assert code == 2 and f"loss.field={tmp_path}/v.safetensors holds another field" in said
    assert "train.extend=true" in said
    code, said = train("run", **settings, train__extend="true")
    assert code == 0 and "loss.field" in history(tmp_path / "run")[0]["changed"], said
    (tmp_path / "field_where_the_command_runs.py").write_text("def v(x, t):\n    return -x * t.view(-1, 1, 1, 1)\n")
    monkeypatch.chdir(tmp_path)
    settings |= {"loss__field": "field_where_the_command_runs:v"}
    assert train("other", **settings)[0] == 0
    code, said = train("third", **settings | {"loss__field": "field_where_the_command_runs:w"})
    assert code == 2 and "loss.field=field_where_the_command_runs:w: " in said and "Traceback" not in said


def test_checkpoints_that_do_not_name_their_data_resume(train, tmp_path):
    """As those of versions before 0.2."""
    assert train("run", train__time_limit=0.001)[0] == 75
    newest = max((tmp_path / "run" / "checkpoints").glob("step_????????"))
    state = json.loads((newest / "state.json").read_text())
    del state["data"]
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    text = (newest / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    code, said = train("run")
    assert code == 0 and f"at step {state['step']}" in said and "damaged" not in said


def test_a_run_begins_from_another(train, tmp_path):
    """With its averaged weights, bit for bit; optimizer and chains where asked for."""
    assert train("first")[0] == 0
    source = tmp_path / "first" / "checkpoints" / "step_00000006"
    assert train("warm", run__init=tmp_path / "first", checkpoint__keep=9)[0] == 0
    start = tmp_path / "warm" / "checkpoints" / "step_00000000"
    for name in ("model", "ema"):
        assert same(load_file(start / f"{name}.safetensors"), load_file(source / "ema.safetensors"))
    assert not load_file(start / "optimizer.safetensors")
    settings = {"run__init": source, "run__init_weights": "raw", "run__init_optimizer": "true"}
    assert train("whole", **settings, run__init_chains="true", checkpoint__keep=9)[0] == 0
    start = tmp_path / "whole" / "checkpoints" / "step_00000000"
    for name in ("model", "optimizer", "stream_0000", "stream_0003"):
        assert same(load_file(start / f"{name}.safetensors"), load_file(source / f"{name}.safetensors"))
    code, said = train("wide", run__init=source, energy__hidden_dim=8)
    assert code == 2 and "run.init=" in said and "does not fit" in said
    assert "no run directory with a checkpoint" in train("none", run__init=tmp_path)[1]
    code, said = train("more", run__init=source, run__init_chains="true", buffer__size=512)
    assert code == 2 and "buffer.size" in said


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
