"""python -m ebm sample, score, evaluate, and train.py's --help and --dry-run, on a real run."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, command, environment, finish

from ebm.__main__ import main as ebm
from ebm.config import Config
from ebm.data.shards import ensure_shards


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """30 steps on digits, with shards of both splits."""
    path = tmp_path_factory.mktemp("trained")
    for split in ("train", "test"):
        ensure_shards(str(path / split), "digits", split)
    finish(command(1, path / "run", path / "train", train__steps=30, evaluate__shards=path / "test"), path / "log")
    return path / "run"


def test_sample(trained, tmp_path):
    out = [tmp_path / f"{name}.npy" for name in "abcd"]
    for path, num, seed in zip(out, (40, 40, 40, 8), (0, 0, 1, 0), strict=True):
        call = ["sample", str(trained), "--num", str(num), "--steps", "5", "--seed", str(seed), "--out", str(path)]
        assert ebm(call) == 0
    a, b, c, d = (np.load(path) for path in out)
    assert a.dtype == np.uint8 and a.shape == (40, 8, 8, 1)
    assert (a == b).all() and (a != c).any() and (a[:8] == d).all()


def test_sample_from_the_buffer_from_images_and_as_a_picture(trained, tmp_path, capsys):
    chains, picture = tmp_path / "chains.npy", tmp_path / "grid.png"
    assert ebm(["sample", str(trained), "--num", "256", "--init", "buffer", "--out", str(chains)]) == 0
    x = np.load(chains)
    assert len(np.unique(x.reshape(256, -1), axis=0)) == 256
    still = tmp_path / "still.npy"
    assert ebm(["sample", str(trained), "--num", "9", "--steps", "0", "--init", str(chains), "--out", str(still)]) == 0
    assert (np.load(still) == x[:9]).all()
    assert ebm(["sample", str(trained), "--num", "9", "--steps", "2", "--out", str(picture)]) == 0
    assert Image.open(picture).size[0] >= 200
    assert ebm(["sample", str(trained), "--num", "257", "--init", "buffer", "--out", str(chains)]) == 2
    assert "257" in capsys.readouterr().err


def test_score_agrees_between_shards_and_arrays(trained, tmp_path):
    from ebm.data.reader import read_all

    shards = trained.parent / "test"
    images = np.concatenate([x.numpy() for x, _, _ in read_all(str(shards), (1, 8, 8))])
    np.save(tmp_path / "images.npy", images.transpose(0, 2, 3, 1))
    for data in (shards, tmp_path / "images.npy"):
        assert ebm(["score", str(trained), "--data", str(data), "--out", str(tmp_path / f"{data.name}.out.npy")]) == 0
    a, b = np.load(tmp_path / "test.out.npy"), np.load(tmp_path / "images.npy.out.npy")
    assert a.dtype == np.float32 and a.shape == (360,)
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert a.std() > 0


def test_one_checkpoint_is_a_run_too(trained, tmp_path):
    first = trained / "checkpoints" / "step_00000020"
    for run in (first, trained):
        assert ebm(["sample", str(run), "--num", "4", "--steps", "3", "--out", str(tmp_path / f"{run.name}.npy")]) == 0
    assert (np.load(tmp_path / "step_00000020.npy") != np.load(tmp_path / "run.npy")).any()


def test_evaluate(trained, tmp_path):
    assert ebm(["evaluate", str(trained), "--num", "200", "--steps", "5", "--json", str(tmp_path / "m.json")]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["frechet/persistent_ratio"] == pytest.approx(
        metrics["frechet/persistent"] / metrics["frechet/floor"]
    )
    assert metrics["frechet/persistent"] > metrics["frechet/floor"] > 0
    assert 0 <= metrics["ood/flipped_auroc"] <= 1


@pytest.mark.parametrize("arguments", [["sample", "nowhere", "--out", "x.npy"], ["score", "nowhere", "--data", "x.npy",
                         "--out", "y.npy"], ["evaluate", "nowhere"], ["index", "nowhere"]])  # fmt: skip
def test_no_such_run(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ebm(arguments) == 4
    assert "nowhere" in capsys.readouterr().err


def test_wrong_images(trained, tmp_path, capsys):
    np.save(tmp_path / "big.npy", np.zeros((3, 9, 9, 1), np.uint8))
    assert ebm(["score", str(trained), "--data", str(tmp_path / "big.npy"), "--out", str(tmp_path / "e.npy")]) == 4
    assert "(3, 9, 9, 1)" in capsys.readouterr().err


def test_help_is_short_and_quick_and_knows_every_key(capsys):
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env=environment(), check=True)  # fmt: skip
    assert time.perf_counter() - started < 20  # seconds; it loads no torch
    assert len(done.stdout.splitlines()) < 60 and max(map(len, done.stdout.splitlines())) <= 120
    whole = help_of("all", capsys)
    for name, field in Config.model_fields.items():
        assert f" {name}" in done.stdout
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"{name}.{key}" in whole and f"{name}.{key}" in help_of(name, capsys)
    assert help_of("optim.lr", capsys).splitlines()[0] == "  optim.lr: float > 0 = 0.0001"
    assert ebm(["train", "--help", "optm"]) == 2
    assert "did you mean optim" in capsys.readouterr().err


def help_of(name: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        ebm(["train", "--help", name])
    assert ended.value.code in (None, 0)
    return capsys.readouterr().out


def test_dry_run_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--dry-run", "sampler.num_steps=40"], cwd=tmp_path,
                          capture_output=True, text=True, env=environment(), check=True)  # fmt: skip
    first = done.stdout.partition("\nrun:\n")[0]
    assert "#   sampler.num_steps=40 (default 20)" in first.partition("\n\n")[0]
    assert re.search(r"\ntime +about [\d.e-]+ s a step on \d+ CPU threads? of this machine, .* for 1,400 steps", first)
    assert "num_steps: 40" in done.stdout and "36,770" in done.stdout
    assert "93% in the chain" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_completion(capsys, tmp_path):
    """By bash itself: commands, options and keys."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        ebm(["--print-completion", "bash"])
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    ask = f". {tmp_path}/completion.sh\nCOMP_WORDS=(ebm $1 $2)\nCOMP_CWORD=$#\n"
    ask += "_shtab_ebm ebm $2\necho ${COMPREPLY[@]}\n"
    for typed, wanted in (
        (["eval"], "evaluate"),
        (["sample", "--grid"], "--grid-by-class"),
        (["train", "optim.l"], "optim.lr="),
    ):
        done = subprocess.run(["bash", "-c", ask, "bash", *typed], capture_output=True, text=True, check=True)
        assert wanted in done.stdout.split(), (typed, done.stdout, done.stderr)
