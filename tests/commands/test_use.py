"""sample, score and evaluate as one uses them: own pictures, classes, outliers, chain lengths; and what they must not
write or open."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from made_runs import VECTORS, make_run, mixture_samples
from PIL import Image
from runs import ROOT, environment

from ebm.__main__ import main as ebm
from ebm.data.shards import ensure_shards, write_shards
from ebm.data.sources import open_source
from ebm.evaluation.metrics import auroc
from ebm.inference.images import from_levels
from ebm.inference.run import open_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        ensure_shards(str(path / split), "digits", split)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    """An untrained energy of digits, whose chains are digits."""
    chains = from_levels(torch.from_numpy(open_source("digits").arrays[:256]).permute(0, 3, 1, 2))
    return make_run(tmp_path_factory.mktemp("made") / "run", "energy.features=[4,8]", "buffer.size=256",
                    f"data.shards={shards}/train", f"evaluate.shards={shards}/test", chains=chains)  # fmt: skip


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, shards):
    chains, labels = torch.rand(128, 1, 8, 8) * 2 - 1, torch.arange(128) % 10
    return make_run(tmp_path_factory.mktemp("made") / "run", "energy.features=[4,8]", "energy.num_classes=10",
                    "buffer.size=128", f"data.shards={shards}/train", chains=chains, labels=labels)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """20 digits as PNG files, the first of which is larger and in colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, array in enumerate(open_source("digits", "test").arrays[:20]):
        Image.fromarray(array[:, :, 0]).save(folder / f"{i:02d}.png")
    Image.open(folder / "00.png").resize((24, 16)).convert("RGB").save(folder / "00.png")
    return folder


def test_score_of_a_folder_as_a_table(run, pictures, tmp_path, caplog):
    out = tmp_path / "scores.csv"
    assert ebm(["score", str(run), "--data", str(pictures), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open(newline="")))
    assert [row["file"] for row in rows] == [str(pictures / f"{i:02d}.png") for i in range(20)]
    assert "1 images of shape 3x16x24 made to fit the run's 1x8x8" in caplog.text
    trained = open_run(run)
    held_out = from_levels(torch.from_numpy(open_source("digits", "test").arrays).permute(0, 3, 1, 2))
    energies = trained.energy(held_out)
    assert [float(row["energy"]) for row in rows[1:]] == pytest.approx(energies[1:20].tolist(), abs=1e-6)
    below = [100 * float((energies < energy).double().mean()) for energy in energies[1:20]]
    assert [float(row["percentile"]) for row in rows[1:]] == pytest.approx(below, abs=0.3)


def test_score_of_one_file_against_others(run, pictures, tmp_path, capsys, shards):
    out = tmp_path / "one.npy"
    call = [
        "score",
        str(run),
        "--data",
        str(pictures / "03.png"),
        "--out",
        str(out),
        "--against",
        str(shards / "train"),
    ]
    assert ebm(call) == 0
    trained = open_run(run)
    train = trained.energy(from_levels(torch.from_numpy(open_source("digits").arrays).permute(0, 3, 1, 2)))
    assert f"AUROC {auroc(train, torch.from_numpy(np.load(out))):.4f}" in capsys.readouterr().out
    assert ebm(["score", str(run), "--data", str(tmp_path / "no.png"), "--out", str(out)]) == 4
    assert "no.png" in capsys.readouterr().err
    assert ebm(["score", str(run), "--data", str(pictures), "--out", "x.txt"]) == 2


def test_a_header_of_terabytes(run, tmp_path, capsys):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 1), }"
    header += b" " * (117 - len(header)) + b"\n"
    file = tmp_path / "huge.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64)
    assert ebm(["score", str(run), "--data", str(file), "--out", str(tmp_path / "e.npy")]) == 4
    assert "huge.npy" in capsys.readouterr().err


def test_chains_from_a_picture(run, pictures, tmp_path):
    out = tmp_path / "still.npy"
    assert (
        ebm(["sample", str(run), "--init", str(pictures / "05.png"), "--num", "3", "--steps", "0", "--out", str(out)])
        == 0
    )
    assert (np.load(out) == np.array(Image.open(pictures / "05.png"))[None, :, :, None]).all() and len(
        np.load(out)
    ) == 3
    assert ebm(["sample", str(run), "--init", str(pictures), "--num", "7", "--steps", "2", "--out", str(out)]) == 0
    assert np.load(out).shape == (7, 8, 8, 1)


def test_samples_of_a_class(conditional, tmp_path, capsys):
    out = tmp_path / "x.npy"
    call = ["sample", str(conditional), "--num", "20", "--steps", "2", "--out", str(out)]
    assert ebm([*call, "--label", "7"]) == 0
    assert (np.load(tmp_path / "x.labels.npy") == 7).all()
    sevens = np.load(out)
    assert ebm(call) == 0
    assert (np.load(tmp_path / "x.labels.npy") == np.arange(20) % 10).all() and (np.load(out) != sevens).any()
    assert (np.load(out)[7] == sevens[7]).all()  # the same start, noise and class
    for wrong in ("10", "seven"):
        assert ebm([*call, "--label", wrong]) == 2
        assert f"--label {wrong}" in capsys.readouterr().err
    buffer = ["sample", str(conditional), "--init", "buffer", "--num", "128", "--out", str(out)]
    assert ebm(buffer) == 0
    assert (np.bincount(np.load(tmp_path / "x.labels.npy"))[:8] == 13).all()


def test_a_row_for_each_class(conditional, run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    call = ["--num", "35", "--steps", "1", "--out", str(out), "--grid-by-class"]
    assert ebm(["sample", str(conditional), *call]) == 0
    assert (np.load(tmp_path / "grid.labels.npy") == np.repeat(np.arange(10), 3)).all()
    width, height = Image.open(out).size
    assert height / width == pytest.approx(10 / 3, rel=0.05)
    assert ebm(["sample", str(run), *call]) == 2 and "class-conditional" in capsys.readouterr().err


def test_outliers_and_lengths(run, pictures, tmp_path, capsys):
    file = tmp_path / "m.json"
    call = ["evaluate", str(run), "--num", "40", "--steps", "4", "--lengths", "8,2", "--ood", f"few={pictures}",
            "--json", str(file), "--metrics", "ood,density"]  # fmt: skip
    assert ebm(call) == 0
    values, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert {"ood/few_auroc", "ood/few_aupr", "ood/few_fpr95", "ood/few_auroc_pca_gaussian"} <= values.keys()
    assert values["ood/few_auroc"] == pytest.approx(0.5, abs=0.2)  # they are digits
    assert {"length/2", "length/8", "length/8_low", "length/2_energy"} <= values.keys()
    worst, best = max(values["length/2"], values["length/8"]), min(values["length/2"], values["length/8"])
    assert values["length/worst_over_best"] == pytest.approx(worst / best)
    assert values["density/long_steps"] == 8 and values["density/verdict"] in ("density", "hole", "walk")
    assert (
        0
        <= values["density/acceptance"]
        <= min(values["density/acceptance_long"], values["density/acceptance_persistent"])
    )
    assert 0 <= values["density/class_shares_worst"] <= 1 and "lengths.png" in shown
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["lengths"] == [2, 8] and kept["values"] == values and Image.open(run / "lengths.png").width > 400
    assert ebm(["report", str(run), "--energies", "50", "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "distance against length" in page and "length/worst_over_best" in page and 'alt="lengths.png"' in page


WRONG = (
    ["--lengths", "10,x"],
    ["--lengths", "0"],
    ["--ood", "mnist"],
    ["--ood", "noise=digits"],
    ["--ood", "a/b=digits"],
    ["--max-samples", "1"],
)


@pytest.mark.parametrize("flags", WRONG)
def test_evaluate_refuses(run, flags, capsys):
    assert ebm(["evaluate", str(run), *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_evaluate_writes_where_the_command_line_says_and_nowhere_else(tmp_path):
    """A config may come from a stranger. (Shards were written to any path that it named.)"""
    run = make_run(tmp_path / "run", "energy.features=[4,8]", "buffer.size=128", f"data.shards={tmp_path}/a/train",
                   f"evaluate.shards={tmp_path}/a/test", chains=torch.zeros(128, 1, 8, 8))  # fmt: skip
    for command in (["evaluate", "--metrics", "energy", "--num", "8", "--steps", "1"], ["report", "--energies", "50"],
                    ["score", "--data", "digits", "--out", str(tmp_path / "run" / "e.csv")]):  # fmt: skip
        assert ebm([command[0], str(run), *command[1:]]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_run_directory_that_can_not_be_written_to(run, tmp_path, capsys, monkeypatch):
    from ebm.commands import evaluate

    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(evaluate, "replace", refuse)  # root may write anywhere
    assert ebm(["evaluate", str(run), "--metrics", "energy", "--num", "8", "--steps", "1"]) == 0
    assert "can't be written to (Permission denied)" in capsys.readouterr().out


def test_density_or_walk_of_a_run(tmp_path, capsys):
    """A run on the exact energy of a Gaussian mixture: at a fifth of its variance its chains sample it, at half not."""
    write_shards(_vectors(tmp_path, mixture_samples(600, dim=64, seed=1)), tmp_path / "shards", progress=False)
    settings = [*VECTORS, "energy.kind=import", "energy.path=made_runs:SteepEnergy", "energy.settings.dim=64",
                "data.shape=[64]", f"data.shards={tmp_path}/shards", "data.noise_std=0", "sampler.bounds=null",
                "sampler.temperature=1", "sampler.grad_clamp=null", "buffer.size=512"]  # fmt: skip
    for share, word in ((0.2, "density"), (0.5, "walk")):
        run = make_run(tmp_path / word, *settings, f"sampler.step_size={0.01 * share}",
                       chains=mixture_samples(512, dim=64))  # fmt: skip
        file = tmp_path / f"{word}.json"
        call = ["--metrics", "density", "--num", "256", "--steps", "400", "--json", str(file)]
        assert ebm(["evaluate", str(run), *call]) == 0
        values = json.loads(file.read_text())
        assert values["density/verdict"] == word, values
        assert f"{word}: a Metropolis test" in capsys.readouterr().out
        assert 0 < values["density/long_energy"] < (1 if word == "density" else 10)  # a step of the walk heats it


def _vectors(folder, x):
    np.save(folder / "x.npy", x.numpy())
    return open_source(f"npy:{folder}/x.npy")


@pytest.mark.parametrize("command", ["--help", "score", "train --help all", "submit"])
def test_a_reader_that_leaves_ends_a_command_quietly(command, run, pictures, tmp_path):
    arguments = ["-m", "ebm", *command.split()]
    if command == "score":
        arguments += [str(run), "--data", str(pictures), "--out", str(tmp_path / "e.npy")]
    elif command == "submit":
        arguments = ["launch/submit.py", "--time=60", "--dry-run", f"run.dir={tmp_path}/run"]
    call = subprocess.Popen([sys.executable, "-u", *arguments], cwd=ROOT, env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    call.stdout.close()  # as `head` does
    said = call.stderr.read().decode()
    assert call.wait(120) in (0, 141) and "Traceback" not in said and "Exception" not in said, said
