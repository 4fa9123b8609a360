"""ebm init: from a folder of one's own pictures to a trained run, by the commands that each command prints."""

import contextlib
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT, environment
from sklearn.datasets import load_sample_images

from ebm.__main__ import main as ebm
from ebm.commands import init
from ebm.commands.init import Data
from ebm.config import load_config
from ebm.data.manifest import load_manifest
from ebm.data.reader import read_all
from ebm.energies import build_energy

SIDE, EACH = 16, 90


def write_patches(folder: Path, each: int = EACH, side: int = SIDE) -> Path:
    """Patches of scikit-learn's two photographs, each photograph a class."""
    draws = np.random.default_rng(0)
    for name, picture in zip(("temple", "flower"), load_sample_images().images, strict=True):
        small = np.asarray(Image.fromarray(picture).resize((320, 213), Image.Resampling.LANCZOS))
        (folder / name).mkdir(parents=True)
        for i in range(each):
            y, x = (draws.integers(0, size - side) for size in small.shape[:2])
            Image.fromarray(small[y : y + side, x : x + side]).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture
def user(tmp_path, monkeypatch):
    """An empty directory, but for a folder of pictures, in which commands run."""
    write_patches(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def advised(text: str) -> list[str]:
    """The commands that a command printed, after `next:` or on lines of their own."""
    return re.findall(r"^(?:next:)?\s*(python -m ebm .*)$", text, re.MULTILINE)


def typed(command: str, *more: str) -> str:
    """Runs a printed command, word for word, with further arguments, and training in a process of its own. Returns its
    output."""
    words = [*shlex.split(command)[1:], *more]
    if words[:3] == ["-m", "ebm", "train"]:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr
    with contextlib.redirect_stdout(StringIO()) as out:
        assert ebm(words[2:]) == 0, command
    return out.getvalue()


PAGE = (ROOT / "docs" / "your_images.md").read_text()
QUICK = {  # arguments that make a command of the page quick
    "shard": [],
    "init": ["--minutes", "0.1"],
    "train": ["train.steps=4", "tracking.num_samples=4", "tracking.sample_steps=2", "tracking.wandb=disabled"],
    "sample": ["--steps", "2"],
    "evaluate": ["--num", "64", "--steps", "2", "--lengths", "2"],
    "report": [],
    "score": [],
}


def test_from_pictures_to_a_report_as_the_page_says_and_as_each_command_prints(user, capsys):
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()]
    assert [shlex.split(command)[3] for command in commands] == [
        "shard", "shard", "init", "train", "sample", "evaluate", "report", "score",
    ]  # fmt: skip
    assert ebm(["init", "--data", "pictures"]) == 2
    assert advised(capsys.readouterr().err) == [*commands[:2], commands[2].removesuffix(" --out pictures.yaml")]
    printed = {command: advised(typed(command, *QUICK[shlex.split(command)[3]])) for command in commands}
    assert printed[commands[0]] == ["python -m ebm init --data pictures-shards/train"]
    assert printed[commands[1]] == ["python -m ebm init --data TRAIN --val pictures-shards/test"]
    assert printed[commands[2]] == [commands[3]]
    assert printed[commands[3]] == commands[4:7]
    config = load_config("pictures.yaml")
    assert config.run.dir == "runs/pictures" and config.data.shape == (3, SIDE, SIDE)
    assert config.evaluate.shards == "pictures-shards/test"
    assert all(Path(made).is_file() for made in ("samples.png", "runs/pictures/report.html", "energies.npy"))
    assert init.free_name("pictures") == "pictures-2"  # the next config has a run directory of its own


def test_what_is_held_out_of_shards_is_a_part_of_each_class(user):
    assert ebm(["shard", "--source", "folder:pictures", "--out", "data/all"]) == 0
    parts = init.held_out(load_manifest("data/all"), "data/all")
    assert parts == ("data/all-train", "data/all-heldout") == init.held_out(load_manifest("data/all"), "data/all")
    images = [x.tobytes() for part in parts for x, _ in samples_of(part)]
    assert set(images) == {x.tobytes() for x, _ in samples_of("data/all")} and len(images) == 2 * EACH
    heldout = [y for _, y in samples_of(parts[1])]
    assert set(heldout) == {0, 1} and 64 * 0.6 < len(heldout) < 64 * 1.5


def samples_of(shards: str) -> list[tuple[np.ndarray, int]]:
    return [
        (x, int(y))
        for images, labels, _ in read_all(shards, (3, SIDE, SIDE))
        for x, y in zip(images.numpy(), labels, strict=True)
    ]


def test_a_folder_with_splits_keeps_them(user):
    for split in ("train", "val", "test"):
        write_patches(user / "split" / split, {"train": 40, "val": 10, "test": 20}[split])
    train, heldout = init.shards_of_pictures(Path("split"), size=8)
    assert load_manifest(train).samples == 80 and load_manifest(heldout).samples == 20  # val: test is for the end
    assert load_manifest(train).shape == (3, 8, 8)


def test_no_advice_trains_on_a_test_split(user, capsys):
    source = ["shard", "--source", "folder:pictures", "--holdout", "0.4", "--split", "test", "--out", "tests"]
    assert ebm(source) == 0
    assert not [line for line in advised(capsys.readouterr().out) if "--data tests" in line]
    assert ebm(["index", "tests"]) == 0
    assert ebm([*source, "--overwrite"]) == 0
    assert ebm(["init", "--data", "tests"]) == 2
    assert "give those of the split train as --data" in capsys.readouterr().err


def test_vectors_are_told_what_to_begin_with(user, capsys):
    np.save("points.npy", np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32))
    assert ebm(["shard", "--source", "npy:points.npy", "--out", "points"]) == 0
    (command,) = advised(capsys.readouterr().out)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "ebm", "train"]
    config = load_config(words[words.index("--config") + 1], words[words.index("--config") + 2 :])
    assert config.data.shards == "points" and config.data.shape == (3,) and config.evaluate.shards is None
    assert ebm(["init", "--data", "points", "--val", "points"]) == 2
    assert "four_peaks.yaml" in capsys.readouterr().err


def test_a_config_that_is_there_is_kept(user, capsys):
    Path("pictures.yaml").write_text("mine")
    assert ebm(["init", "--data", "pictures"]) == 2
    assert "--overwrite" in capsys.readouterr().err and Path("pictures.yaml").read_text() == "mine"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 16, 16), (3, 32, 32), (3, 64, 64), (3, 40, 56)])
def test_every_recipe_is_a_config_with_a_reason_for_each_value(shape, gpu, tmp_path):
    choices = init.recipe(Data("mine", "a dir/train", "a dir/test", shape, 1000, gpu)) + init.schedule(700)
    (tmp_path / "c.yaml").write_text(init.to_yaml(choices, ["head"]))
    config = load_config(tmp_path / "c.yaml").model_dump(mode="json")
    for key, value, why in choices:
        section, name = key.split(".")
        assert config[section][name] == value and why
    small = load_config(tmp_path / "c.yaml", ["energy.features=[8,8,8,8]" if shape[0] == 3 else "run.seed=0"])
    assert build_energy(small.energy, shape, 0)(torch.zeros(2, *shape)).shape == (2,)
    assert ("spectral_norm: true" in (tmp_path / "c.yaml").read_text()) == (shape != (1, 8, 8))


def test_the_number_of_steps_fills_the_time():
    assert init.steps_for(10, step_s=0.5, panel_s=0) == 1200
    assert init.steps_for(10, step_s=0.5, panel_s=10) == 1000
    assert init.steps_for(1, step_s=60, panel_s=10) == init.FEWEST_STEPS
    assert init.steps_for(1e6, step_s=0.1, panel_s=0) == init.MOST_STEPS


@pytest.mark.parametrize(("where", "name"), [("data/birds/train", "birds"), ("birds-shards/train", "birds"), ("x", "x"),
                         ("data/my birds", "my_birds"), ("/train", "train"), (".", "run")])  # fmt: skip
def test_the_name_is_that_of_the_data(where, name):
    assert init.name_of(where) == name
