"""Values are read by the type of their key, in every form that people write them; files stand on files; and what
belongs to one data set does not go over to another."""

import argparse
import json
import logging

import pytest
import yaml

from ebm.config import check_places, differences, load_config
from ebm.config.reading import overrides_last
from ebm.errors import ConfigError


def refusal(overrides, path=None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["0123", "2024_01_01", "on", "1e3", "null_run", "#1", "a: b", "[x", "1:30", "yes", "{}"]
)
def test_text_is_not_retyped(tmp_path, text):
    """YAML reads 0123 as 83, 2024_01_01 as 20240101 and on as true."""
    given = load_config(None, [f"run.dir={text}", f"tracking.name={text}"])
    assert given.run.dir == given.tracking.name == text
    file = tmp_path / "mine.yaml"
    if text not in ("#1", "a: b", "[x", "{}"):  # which are YAML's own signs in a file, and need quotes there
        file.write_text(f"base: digits\nrun: {{dir: {text}}}\ntracking:\n  name: {text}\n  tags: [{text}]\n")
        read = load_config(file)
        assert read.run.dir == read.tracking.name == text and read.tracking.tags == (text,)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.shape=1,8,8", "data.shape", (1, 8, 8)),
        ("data.shape=[1, 8, 8]", "data.shape", (1, 8, 8)),
        ("energy.features=8", "energy.features", (8,)),
        ("tracking.tags=a,0123,on", "tracking.tags", ("a", "0123", "on")),
        ("tracking.tags=[a, 0123]", "tracking.tags", ("a", "0123")),
        ("tracking.tags=one", "tracking.tags", ("one",)),
        ("optim.betas=0,0.99", "optim.betas", (0.0, 0.99)),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("train.steps=0100", "train.steps", 100),
        ("train.steps=1e3", "train.steps", 1000),
        ("data.trace=True", "data.trace", True),
        ("data.trace=off", "data.trace", False),
        ("train.time_limit=None", "train.time_limit", None),
        ("tracking.name=null", "tracking.name", None),
        ("tracking.name='null'", "tracking.name", "null"),
        ("run.dir='a b'", "run.dir", "a b"),
        ("sampler.start=normal", "sampler.start", "normal"),
        ("sampler.start=-1,1", "sampler.start", (-1.0, 1.0)),
        ("train.mixed_precision=no", "train.mixed_precision", "no"),
        ("energy={kind: mlp, hidden_dim: 0010}", "energy.hidden_dim", 10),
    ],
)
def test_values_are_read_by_the_type_of_their_key(override, key, value):
    section, name = key.split(".")
    assert getattr(getattr(load_config(None, [override]), section), name) == value


def test_numbers_are_not_times(tmp_path):
    """YAML 1.1 reads 1:30 as 90."""
    assert "train.time_limit='1:30'" in refusal(["train.time_limit=1:30"])


def test_home_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(None, ["run.dir=~/a", "data.source=folder:~/b", "data.shards=~/c", "data.cache_dir=~"])
    assert (config.run.dir, config.data.source) == (f"{tmp_path}/a", f"folder:{tmp_path}/b")
    assert (config.data.shards, config.data.cache_dir) == (f"{tmp_path}/c", str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\nevaluate: {shards: ~/d}\n")
    assert load_config("~/mine.yaml").evaluate.shards == f"{tmp_path}/d"
    assert "no home directory ~nobody_here" in refusal(["run.dir=~nobody_here/x"])
    assert load_config(None, ["run.dir=a~b"]).run.dir == "a~b"


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("lr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("optimizer.lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("batch_size", "train.batch_size"),
        ("data.num_workers", "data.workers"),
        ("max_steps", "train.steps"),
        ("epochs", "train.steps"),
        ("seed", "run.seed"),
        ("output_dir", "run.dir"),
        ("model.features", "energy.features"),
        ("wandb_project", "tracking.project"),
        ("every", "checkpoint.every"),
    ],
)
def test_keys_of_other_trainers_lead_to_ours(key, ours):
    message = refusal([f"{key}=1"])
    assert f"{key}: unknown key" in message and ours in message


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--config", action="append")
    made.add_argument("--dry-run", action="store_true")
    return made


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--optim.lr=1e-3"], ["optim.lr=1e-3"]),
        (["--optim.lr", "1e-3"], ["optim.lr=1e-3"]),
        (["--batch-size", "64"], ["batch_size=64"]),
        (["--data.trace", "a.b=1"], ["a.b=1", "data.trace=true"]),
        (["--optim.lr", "-1"], ["optim.lr=-1"]),
        (["a.b=1", "--config", "x", "c.d=2", "--dry-run"], ["--config", "x", "--dry-run", "a.b=1", "c.d=2"]),
        (["--config=x", "--energy.features=[8, 16]"], ["--config=x", "energy.features=[8, 16]"]),
    ],
)
def test_forms_of_overrides(given, read):
    assert sorted(overrides_last(parser(), given)) == sorted(read)


def test_options_that_are_none():
    with pytest.raises(ConfigError, match="--dryrun: no option"):
        overrides_last(parser(), ["--dryrun"])


def test_a_config_stands_on_others(tmp_path):
    """`base` names files or shipped configs, from the file's own folder; later ones win, and the file over all."""
    (tmp_path / "low.yaml").write_text("base: mnist\noptim: {lr: 0.5, warmup_steps: 7}\nenergy: {kind: mlp}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.yaml").write_text("base: [../low.yaml]\noptim: {lr: 0.25}\n")
    config = load_config(tmp_path / "sub" / "top.yaml", ["train.steps=3"])
    assert (config.optim.lr, config.optim.warmup_steps, config.energy.kind) == (0.25, 7, "mlp")
    assert config.data == load_config("mnist").data and config.train.steps == 3
    (tmp_path / "fast.yaml").write_text("optim: {lr: 0.75}\n")
    both = load_config([tmp_path / "sub" / "top.yaml", tmp_path / "fast.yaml"])
    assert (both.optim.lr, both.optim.warmup_steps) == (0.75, 7)


def test_bases_that_can_not_be(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "base of itself" in refusal([], tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("base: none\n")
    assert "c.yaml: base none: no such file" in refusal([], tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("base: [1]\n")
    assert "base=1" in refusal([], tmp_path / "d.yaml")


def test_another_source_takes_the_old_ones_places_away(caplog):
    """Its shards, its held-out data, its run directory; all of it is said."""
    caplog.set_level(logging.INFO)
    config = load_config(None, ["data.source=folder:pics/cats/train"])
    assert (config.data.shards, config.run.dir) == ("data/cats/train", "runs/cats")
    assert (config.evaluate.source, config.evaluate.shards) == (None, None)
    for text in ("evaluate.shards=data/digits/test", "run.dir=runs/digits", "data.shards=data/cats/train"):
        assert text in caplog.text
    own = load_config(None, ["data.source=null", "data.shards=mine"])
    assert (own.data.source, own.evaluate.shards, own.run.dir) == (None, None, "runs/mine")
    named = load_config(None, ["data.source=mnist"])
    assert named.evaluate.model_dump() == {"source": "mnist", "shards": "data/mnist/test"}


def test_what_is_given_stays(tmp_path):
    given = ["data.source=npy:x.npy", "data.shards=s", "run.dir=r", "evaluate.shards=e"]
    config = load_config(None, given)
    assert (config.data.shards, config.run.dir, config.evaluate.shards) == ("s", "r", "e")
    assert config.evaluate.source is None
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 2}))
    assert load_config(None, [f"evaluate.shards={tmp_path}"]).evaluate.source is None
    assert load_config(None, ["evaluate.shards=new"]).evaluate.source == "digits"
    file = load_config("mnist", ["data.source=mnist", "data.shards=elsewhere"])
    assert file.evaluate == load_config("mnist").evaluate and file.run.dir == "runs/mnist"


def test_shards_moved_or_made_elsewhere(tmp_path):
    """The same data in another place keep what belongs to them; shards that name no source do not."""
    kept = load_config(None, [f"data.shards={tmp_path}"])
    assert kept.data.source == "digits" and kept.evaluate.source == "digits"
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 2, "source": {"source": "digits"}}))
    assert load_config(None, [f"data.shards={tmp_path}"]).evaluate.source == "digits"
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 2}))
    own = load_config(None, [f"data.shards={tmp_path}"])
    assert own.data.source is own.evaluate.source is own.evaluate.shards is None
    assert load_config("celeba64", ["data.shards=x"]).evaluate.shards is None


def places(tmp_path, *overrides, path=None) -> str:
    """What is said of them; empty where they are taken."""
    given = [item.replace("TMP", str(tmp_path)) for item in overrides]
    try:
        check_places(load_config(path, given), path, given)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_mistyped_directory_of_shards_gets_no_other_data(tmp_path, caplog):
    """Nothing is there, and the source is the config's: digits would be written to it, and trained on."""
    (tmp_path / "shards" / "pictures").mkdir(parents=True)
    (tmp_path / "shards" / "pictures" / "manifest.json").write_text(json.dumps({"version": 2, "source": {}}))
    for typo in ("shards/pitcures", "shrads/pictures"):
        said = places(tmp_path, f"data.shards=TMP/{typo}")
        assert f"data.shards={tmp_path}/{typo}" in said and "data.source=digits comes from the config" in said
        assert f"did you mean {tmp_path}/shards/pictures?" in said and "Give data.source=digits beside it" in said
    assert "evaluate.source=digits comes from" in places(tmp_path, "evaluate.shards=TMP/shards/picture")
    with caplog.at_level("INFO"):
        assert not places(tmp_path, "data.shards=TMP/other")
    assert (
        f"data.shards={tmp_path}/other: there are no shards yet; they are written from data.source=digits"
        in caplog.text
    )
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: digits\ndata: {{shards: {tmp_path}/shards/pictuers}}\n")
    assert "did you mean" in places(tmp_path, path=file)


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["data.shards=data/digits/train"],
        ["data.shards=TMP/digits"],  # the same data in another place
        ["data.shards=TMP/Digits-8x8/train", "evaluate.shards=TMP/Digits-8x8/test"],
        ["data.shards=TMP/new", "data.source=digits"],
        ["data.shards=TMP/new", "data.source=null"],
        ["data.shards=TMP/there"],
        ["data.shards=TMP/there/manifest.json"],
        ["data.shards=https://host/new"],
        ["data.source=folder:pics/cats/train"],
        ["data.source=mnist"],
    ],
)
def test_directories_of_shards_that_are_meant(tmp_path, given):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "manifest.json").write_text(json.dumps({"version": 2, "source": {}}))
    assert places(tmp_path, *given) == ""


def test_a_manifest_anywhere_may_be_of_unknown_source(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"version": 2}))
    own = load_config(None, [f"data.shards={tmp_path}/mine.json"])
    assert own.data.source is own.evaluate.source is own.evaluate.shards is None


def test_a_config_on_a_shipped_one_leaves_its_data(tmp_path):
    file = tmp_path / "cats.yaml"
    file.write_text(yaml.safe_dump({"base": "digits", "data": {"source": "folder:cats"}, "run": {"dir": "runs/c"}}))
    config = load_config(file)
    assert (config.data.shards, config.run.dir, config.evaluate.shards) == ("data/cats/train", "runs/c", None)


def test_differences_from_the_defaults():
    found = differences(load_config(None, ["optim.lr=0.5", "energy.kind=mlp"]))
    assert found["optim.lr"] == (1e-4, 0.5) and found["energy.kind"] == ("resnet", "mlp")
    assert found["data.shards"] == (None, "data/digits/train")
    assert "optim.weight_decay" not in found and "energy.hidden_dim" not in found
