"""The configuration: what is accepted, what is refused and in which words, what comes back from disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from runs import ROOT

from ebm.config import Config, check_same_run, describe, flatten, load_config, to_yaml, validate
from ebm.config.energies import NetworkConfig
from ebm.errors import ConfigError

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path):
    """Writes a config and returns its path; the only required key is there by default."""

    def write(text: str | bytes, base: str = "data: {shards: d}\n") -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else (base + text).encode())
        return path

    return write


def refusal(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    config = load_config(path)
    assert Path(config.run.dir).name == path.stem
    assert Config(**OmegaConf.to_container(OmegaConf.create(to_yaml(config)))) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_state_the_size_of_their_network(path):
    """So that another default does not change what they compute."""
    stated = yaml.safe_load(path.read_text())["energy"]
    sizes = set(type(load_config(path).energy).model_fields) - set(NetworkConfig.model_fields)
    assert sizes <= set(stated)


def test_defaults_resolve(config_file):
    config = load_config(config_file(""))
    assert (config.energy.kind, config.sampler.kind, config.loss.kind) == ("resnet", "langevin", "contrastive")
    assert config.sampler.noise == config.sampler.noise_scale == 0.005
    assert config.data.shards == "d"
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3


def test_overrides_win_and_keep_the_rest(config_file):
    config = load_config(config_file("train: {steps: 7, batch_size: 64}\n"), ["train.steps=9", "data.shape=[1,8,8]"])
    assert (config.train.steps, config.train.batch_size, config.data.shape) == (9, 64, (1, 8, 8))


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.step=5", "train.steps"),
        ("sampler.stepsize=5", "sampler.step_size"),
        ("checkpoint.evry=5", "checkpoint.every"),
        ("loss.L2=1", "loss.l2"),
        ("optim.learning_rate=1", None),
        ("trian.steps=5", None),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(config_file, override, nearest):
    message = refusal(config_file(""), override)
    assert f"{override.split('=')[0]}: unknown key" in message or f"{override.split('.')[0]}: unknown key" in message
    assert nearest is None or f"did you mean {nearest}" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=0", ("train.steps=0", "greater than or equal to 1")),
        ("train.steps=many", ("train.steps='many'", "integer")),
        ("train.steps=1.5", ("train.steps=1.5", "integer")),
        ("optim.lr=-1", ("optim.lr=-1", "greater than 0")),
        ("optim.lr=nan", ("optim.lr", "finite")),
        ("optim.lr=inf", ("optim.lr", "finite")),
        ("optim.betas=[0,1]", ("betas (0.0, 1.0)", "below 1")),
        ("optim.ema_decay=1", ("optim.ema_decay=1", "less than 1")),
        ("buffer={reinit_prob: 0.5, reinit_spread: 100}", ("reinit_spread=100", "at most 0.21")),
        ("buffer.reinit_prob=1.5", ("buffer.reinit_prob=1.5", "less than or equal to 1")),
        ("data.on_error=ignore", ("data.on_error='ignore'", "'fail' or 'skip'")),
        ("data.shape=[0,8,8]", ("data.shape=[0, 8, 8]", "positive")),
        ("sampler.bounds=[1,-1]", ("bounds (1.0, -1.0)", "low < high")),
        ("energy.kind=mpl", ("'mpl'", "'mlp', 'conv', 'resnet'")),
        ("tracking.wandb=yes", ("tracking.wandb", "'auto', 'online', 'offline' or 'disabled'")),
        ("train=5", ("train=5", "dictionary")),
        ("sampler=null", ("sampler=None", "dictionary")),
        ("energy={kind: import, path: nocolon}", ("energy.path='nocolon'", "pattern")),
        ("sampler.schedule=linear", ("sampler", "step_size_end or noise_scale_end")),
        ("sampler.step_size_end=1", ("sampler", "schedule other than constant")),
        ("train.batch_size=100", ("train.batch_size=100", "data.streams=8", "96 or 104")),
        ("train.batch_size=4", ("train.batch_size=4", "use 8,")),
        ("train.accumulate=3", ("train.batch_size=128", "train.accumulate=3", "120 or 144")),
        ("buffer.size=8193", ("buffer.size=8193", "use 8200")),
        ("buffer.size=64", ("buffer.size=64", "train.batch_size=128", "raise buffer.size")),
        ("buffer.size=-1", ("buffer.size=-1", "1 or more", "use auto")),
        ("buffer.size=autoo", ("buffer.size='autoo'", "or auto", "buffer.age", "multiple of data.streams")),
        ("buffer.age=0", ("buffer.age=0", "greater than or equal to 1")),
    ],
)
def test_refusals_name_key_value_and_remedy(config_file, override, words):
    message = refusal(config_file(""), override)
    assert all(word in message for word in words), message


def test_every_problem_is_told_at_once(config_file):
    message = refusal(config_file(""), "train.steps=0", "optim.lr=-1", "run.seed=-2")
    assert all(key in message for key in ("train.steps=0", "optim.lr=-1", "run.seed=-2"))


def test_a_small_buffer_is_fine_without_persistent_chains(config_file):
    assert load_config(config_file(""), ["buffer.size=64", "loss.negatives=noise"]).buffer.size == 64


DUAL = "loss.kind=dual_score_matching sampler.kind=noise_levels energy.noise_conditional={} data.noise_std=0 "


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ("train.steps=1000 sampler.num_steps=20 train.batch_size=128 buffer.age=5000", 512),  # 2,560,000 / 5,000
        ("train.steps=1000 sampler.num_steps=20 train.batch_size=128 buffer.age=5060", 504),  # 505.9: 63 a stream
        ("train.steps=1000 sampler.num_steps=20 train.batch_size=128 buffer.age=5030", 512),  # 508.9: 64 a stream
        ("train.steps=1000 sampler.num_steps=20 train.batch_size=128", 256),  # the default age of 10,000
        ("train.steps=10 sampler.num_steps=1 train.batch_size=128", 128),  # no fewer than the batch
        ("train.steps=10 sampler.num_steps=1 train.batch_size=96 data.streams=6 train.accumulate=2", 96),
        ("train.steps=10 train.batch_size=16 energy.num_classes=10", 80),  # a chain of each class in 8 streams
        ("train.steps=10 train.batch_size=16 loss.kind=jem energy.num_classes=10", 16),  # chains without classes
        ("train.steps=1000 sampler.num_steps=20 loss.negatives=noise buffer.age=1", 128),  # the buffer is not used
        (DUAL + "loss.contrastive_weight=.1 loss.warmup_steps=600 train.steps=1000 sampler.num_steps=5 "
         "buffer.age=500", 512),  # 400 steps with chains
        (DUAL + "loss.contrastive_weight=.1 loss.warmup_steps=600 train.steps=500", 128),  # none
        (f"train.steps={10**30} sampler.num_steps=1 train.batch_size=8", 8 * 10**26),  # to the last digit
    ],
)  # fmt: skip
def test_the_size_of_the_buffer_from_the_age_of_its_chains(config_file, settings, slots):
    config = load_config(config_file(""), ["buffer.size=auto", *settings.split()])
    assert config.buffer_size == slots and config.buffer_size % config.data.streams == 0
    assert config.buffer.size == "auto" and "size: auto" in to_yaml(config)
    assert load_config(config_file(to_yaml(config), "")).buffer_size == slots
    load_config(config_file(""), [*settings.split(), f"buffer.size={slots}"])  # every check of a number holds


@pytest.mark.parametrize("kind", ["contrastive", "jem", "improved_contrastive", "dual"])
def test_the_steps_of_chains_are_those_of_the_steps_that_have_any(config_file, kind):
    dual = [*DUAL.split(), "loss.contrastive_weight=.1", "loss.warmup_steps=7"]
    settings = dual if kind == "dual" else [f"loss.kind={kind}", "energy.num_classes=10"]
    for steps in (3, 7, 8, 20):
        config = load_config(config_file(""), [*settings, f"train.steps={steps}", "sampler.num_steps=3"])
        with_chains = sum(config.loss.negatives_at(step) == "persistent" for step in range(1, steps + 1))
        assert config.chain_steps == with_chains * 3 * config.train.batch_size


def test_an_automatic_size_is_compared_by_what_it_comes_to(config_file):
    def made(*overrides: str):
        return load_config(config_file(""), ["train.steps=1000", "sampler.num_steps=20", *overrides])

    auto = made("buffer.size=auto", "buffer.age=5000")
    assert not check_same_run(auto, made("buffer.size=512"), "runs/a")
    assert not check_same_run(made("buffer.size=512"), auto, "runs/a")
    assert not check_same_run(auto, made("buffer.size=auto", "buffer.age=5001"), "runs/a")
    for other in (["buffer.age=5000", "train.steps=2000", "train.extend=true"], ["buffer.age=2500"]):
        with pytest.raises(ConfigError) as caught:
            check_same_run(auto, made("buffer.size=auto", *other), "runs/a")
        said = str(caught.value)
        assert "buffer.size: 512 there, 1024 now" in said and "give buffer.size=512" in said and "buffer.age" in said
    kept = made("train.steps=2000", "train.extend=true", "buffer.size=512")
    assert check_same_run(auto, kept, "runs/a") == {"train.steps": (1000, 2000)}


@pytest.mark.parametrize(
    "override", ["train.steps", "steps 5", "=5", "train..steps=5", "train.steps=[1", "run.dir=${no}"]
)
def test_malformed_overrides(config_file, override):
    refusal(config_file(""), override)


@pytest.mark.parametrize(
    "content",
    [b"- a\n- b\n", b"42\n", b"hello\n", b"", bytes(range(256)), b"a\0b", b"train: [1,", b"a: 1\n b: 2\n"],
    ids=["list", "number", "string", "empty", "binary", "nul", "unclosed", "indented"],
)
@pytest.mark.parametrize("overrides", [(), ("train.steps=3",)], ids=["plain", "overridden"])
def test_files_that_are_no_config(config_file, content, overrides):
    assert "config.yaml" in refusal(config_file(content), *overrides)


def test_missing_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.yaml")
    assert "no such file" in refusal(tmp_path)


def test_shipped_configs_have_names(tmp_path, monkeypatch):
    """Wherever the command runs; a file that is there goes first, and other missing files are errors."""
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "configs/mnist.yaml"):
        assert load_config(name).run.dir == "runs/mnist"
    for missing in ("mnist.yaml", "other/mnist.yaml", "configs/none.yaml", str(tmp_path / "configs" / "mnist.yaml")):
        assert "no such file" in refusal(missing)
    assert all(path.stem in refusal("none") for path in SHIPPED)
    for name in ("mnist", "configs/mnist.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("data: {shards: d}\nrun: {dir: mine}\n")
        assert load_config(name).run.dir == "mine"


def test_an_installed_package_has_the_shipped_configs(tmp_path):
    """Laid out as in a wheel, with the configs inside of the package; from another folder."""
    package = tmp_path / "installed" / "ebm"
    for part in ("__init__.py", "errors.py", "config"):
        (shutil.copytree if part == "config" else shutil.copy)(ROOT / "ebm" / part, _made(package) / part)
    shutil.copytree(ROOT / "configs", package / "configs")
    program = (
        "from ebm.config import load_config; print(load_config('configs/mnist.yaml').run.dir, load_config().run.dir)"
    )
    shown = subprocess.run([sys.executable, "-c", program], cwd=_made(tmp_path / "elsewhere"), text=True,
                           env=os.environ | {"PYTHONPATH": str(package.parent)}, capture_output=True)  # fmt: skip
    assert shown.stdout.split() == ["runs/mnist", "runs/digits"], shown.stderr


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_temperature_and_noise_scale_replace_each_other(config_file):
    given_noise, given_temperature = "sampler: {noise_scale: 0.01}\n", "sampler: {temperature: 0.2, step_size: 0.1}\n"
    sampler = load_config(config_file(given_noise), ["sampler.temperature=0.2", "sampler.step_size=0.1"]).sampler
    assert (sampler.noise_scale, sampler.temperature) == (None, 0.2)
    assert sampler.noise == pytest.approx(0.2)  # sqrt(2 * .1 * .2)
    sampler = load_config(config_file(given_temperature)).sampler
    assert sampler.noise_scale is None and sampler.noise == pytest.approx(0.2)
    sampler = load_config(config_file(given_temperature), ["sampler.noise_scale=0.03"]).sampler
    assert (sampler.noise_scale, sampler.temperature, sampler.noise) == (0.03, None, 0.03)
    both = "sampler: {noise_scale: 0.01, temperature: 0.2}\n"
    assert "exactly one of noise_scale and temperature" in refusal(config_file(both))
    message = refusal(config_file(""), "sampler.noise_scale=0.01", "sampler.temperature=0.2")
    assert "exactly one of noise_scale and temperature" in message
    assert "exactly one" in refusal(config_file(""), "sampler.noise_scale=null")


def test_saying_that_there_is_no_temperature_keeps_the_noise(config_file):
    path = config_file("sampler: {noise_scale: 0.01}\n")
    assert load_config(path, ["sampler.temperature=null"]).sampler.noise_scale == 0.01


def test_another_kind_drops_the_other_keys_of_its_section(config_file):
    path = config_file("energy: {kind: conv, features: [4, 4], hidden_dim: 7}\n")
    assert load_config(path, ["energy.kind=mlp"]).energy.model_dump() == {
        "kind": "mlp",
        "latent": None,
        "hidden_dim": 64,
        "num_layers": 2,
        "noise_conditional": None,
        "spectral_norm": False,
        "num_classes": None,
        "activation": "silu",
        "confine": 0.0,
    }
    assert load_config(path, ["energy.kind=conv"]).energy.features == (4, 4)
    assert load_config(path, ["energy.kind=resnet", "energy.features=[8]"]).energy.features == (8,)


def test_chains_of_classes_that_never_restart(config_file):
    """Their classes would never follow the data's."""
    path = config_file("energy: {kind: conv, num_classes: 10}\nbuffer: {size: 8192, reinit_prob: 0}\n")
    assert "set buffer.reinit_prob above 0" in refusal(path)
    load_config(path, ["buffer.reinit_prob=1e-6"])
    load_config(path, ["energy.num_classes=null"])
    load_config(path, ["loss.kind=jem"])  # whose chains have no classes


def test_a_key_of_another_kind(config_file):
    message = refusal(config_file("energy: {kind: resnet}\n"), "energy.num_layers=3")
    assert "energy.num_layers: unknown key of this energy.kind (mlp and graph have it)" in message


def test_a_sampler_has_the_noise_levels_of_the_energy(config_file):
    path = config_file(
        "energy: {kind: conv, noise_conditional: {sigma_min: 0.2, sigma_max: 5}}\n"
        "sampler: {kind: noise_levels}\nloss: {kind: dual_score_matching}\n"
    )
    sampler = load_config(path, ["data.noise_std=0"]).sampler
    assert (sampler.sigma_min, sampler.sigma_max) == (0.2, 5.0)
    with pytest.raises(ConfigError, match="has noise of"):
        load_config(path, ["data.noise_std=0", "sampler.sigma_max=4"])


def test_sections_in_a_section(config_file):
    """The parts of a hybrid energy: default kind, another kind, and messages that name the key as it is written."""
    path = config_file("energy: {kind: hybrid, network: {kind: mlp, num_layers: 3}, prior: {std: 2}}\n")
    energy = load_config(path).energy
    assert (energy.network.num_layers, energy.prior.std, energy.prior.mean) == (3, 2, 0)
    assert load_config(path, ["energy.network.kind=conv"]).energy.network.features == (16, 32, 32, 64)
    default = config_file("energy: {kind: hybrid}\n")
    energy = load_config(default, ["energy.network.hidden_dim=7", "energy.network.num_classes=3"]).energy
    assert (energy.network.kind, energy.network.hidden_dim, energy.num_classes) == ("mlp", 7, 3)
    assert "energy.network.widht: unknown key (did you mean energy.network" in refusal(path, "energy.network.widht=1")
    assert "energy.prior.std=0: " in refusal(path, "energy.prior.std=0")
    message = refusal(path, "energy.network.kind=hybrid")
    assert "energy.network: " in message and "'mlp', 'conv', 'resnet'" in message


def test_describe_covers_every_key(config_file):
    rows = describe()
    named = [(row.key, kind) for row in rows for kind in row.kinds or [None]]
    assert len(set(named)) == len(named)
    assert all(row.meaning for row in rows)
    keys = {row.key for row in rows}
    for kind in (
        "mlp",
        "conv",
        "resnet",
        "wide_resnet",
        "unet",
        "transformer",
        "graph",
        "gaussian",
        "hybrid",
        "import",
    ):
        overrides = [f"energy.kind={kind}"] + (["energy.path=a:B", "energy.settings.a=1"] if kind == "import" else [])
        resolved = set(flatten(load_config(config_file(""), overrides).model_dump())) - {"energy.settings.a"}
        assert resolved <= keys
    assert ("train.steps", (), "int >= 1", "100000", "optimizer steps of the whole run") in rows
    of = {row.key: row for row in rows}
    assert of["data.shards"].default == "required"
    assert (of["train.time_limit"].type, of["train.time_limit"].default) == ("float|null > 0", "null")
    assert of["optim.ema_decay"].type == "float >= 0 and < 1"
    assert (of["energy.kind"].type[:16], of["energy.kind"].default) == ("mlp|conv|resnet|", '"resnet"')
    assert "\nhybrid: E(x) = E_prior(x) + weight * E_network(x)." in of["energy.kind"].meaning
    assert of["energy.network.kind"].kinds == ("hybrid",)
    assert of["energy.confine"].kinds == ("mlp", "conv", "resnet", "wide_resnet", "unet", "transformer", "graph")
    norms = [(row.kinds, row.default) for row in rows if row.key == "energy.spectral_norm"]
    assert norms == [(("mlp", "conv", "wide_resnet", "unet", "transformer", "graph"), "false"), (("resnet",), "true")]


plain = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_characters="$\\"), max_size=12)
directories = plain.filter(lambda name: name.strip() and name.isprintable() and "~" not in name)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | plain | st.floats(-1e30, 1e30)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), scalars, max_size=4), directories, st.floats(1e-12, 1e3))
def test_yaml_round_trip(arguments, directory, lr):
    energy = {"kind": "import", "path": "a.b:C", "settings": arguments}
    values = {"run": {"dir": directory}, "data": {"shards": "d"}, "energy": energy, "optim": {"lr": lr}}
    config = validate(values, "test")
    again = validate(OmegaConf.to_container(OmegaConf.create(to_yaml(config)), resolve=True), "again")
    assert again == config


def test_resolved_file_reads_back(config_file, tmp_path):
    config = load_config(config_file("sampler: {temperature: 0.2}\n"), ["optim.lr=1e-5", "tracking.tags=[a,b]"])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_same_run(config_file):
    path = config_file("energy: {kind: resnet}\n")
    old = load_config(path)
    free = [
        "run.dir=x",
        "data.shards=y",
        "data.workers=3",
        "data.trace=true",
        "data.on_error=skip",
        "data.max_skipped=0.2",
        "train.time_limit=3",
        "train.log_every=1",
    ]
    free += ["health.max_skipped_steps=2", "checkpoint.every=5", "tracking.wandb=offline", "evaluate.shards=z"]
    moved = load_config(path, free)
    check_same_run(old, moved, "runs/old")
    changes = {"run.seed": 1, "train.steps": 5, "train.batch_size": 64, "energy.blocks": 3, "sampler.num_steps": 9}
    for key, value in changes.items():
        new = load_config(path, [*free, f"{key}={value}"])
        with pytest.raises(ConfigError) as caught:
            check_same_run(old, new, "runs/old")
        assert f"  {key}: " in str(caught.value) and f"{value!r} now" in str(caught.value)
        assert str(caught.value).count(" there, ") == 1


def test_mixed_precision_no_is_a_word_although_yaml_reads_it_as_false(config_file):
    assert load_config(config_file("train: {mixed_precision: no}\n")).train.mixed_precision == "no"
    assert load_config(config_file(""), ["train.mixed_precision=no"]).train.mixed_precision == "no"
