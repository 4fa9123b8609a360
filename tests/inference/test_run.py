"""A run opened for use: its energy, score, samples and chains, by closed forms; devices; checkpoints that vanish."""

import json
import math
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from made_runs import VECTORS, make_run
from runs import ROOT, command, environment, finish

import ebm
from ebm.__main__ import main
from ebm.config.samplers import LangevinConfig, MALAConfig, TemperingConfig
from ebm.energies import with_noise_level
from ebm.errors import ConfigError, DataError
from ebm.inference.images import to_states
from ebm.inference.inputs import read_states
from ebm.inference.run import open_run
from ebm.samplers import can_be_continued, chains_of_lengths, fresh_chains, langevin
from ebm.samplers.factory import settings_of

PLANE = (*VECTORS, "data.shape=[2]", "energy.std=0.5", "energy.mean=0.25", "sampler.bounds=null")
PLANE = (*PLANE, "sampler.temperature=0.5", "sampler.step_size=0.01", "sampler.grad_clamp=null", "buffer.size=128")


@pytest.fixture
def plane(tmp_path):
    """N(.25, .5^2 I) on the plane, as an energy at T = .5."""
    chains = torch.arange(256.0).reshape(128, 2)
    return make_run(tmp_path / "run", *PLANE, "data.shards=/nowhere", chains=chains)


def test_energy_and_score_are_those_of_the_gaussian(plane):
    run = ebm.load(plane)
    x = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))
    energy = ((x - 0.25) / 0.5).square().sum(1) / 2
    found = run.energy(x)
    assert found.shape == (1500,) and found.dtype == torch.float32
    torch.testing.assert_close(found - found[0], energy - energy[0], atol=1e-4, rtol=1e-4)  # up to a constant
    torch.testing.assert_close(run.score(x), -(x - 0.25) / 0.25 / 0.5, atol=1e-4, rtol=1e-4)  # -dE/dx / T
    assert (run.shape, run.temperature, run.num_classes, run.step) == ((2,), pytest.approx(0.5), None, 1)
    denoised = x - run.data_noise**2 * (x - 0.25) / 0.25 / 0.5
    torch.testing.assert_close(run.denoised(x), denoised, atol=1e-4, rtol=1e-4)
    assert run.energy(torch.empty(0, 2)).shape == (0,)
    with pytest.raises(ValueError, match=r"must be \(B, 2\)"):
        run.energy(x[0])


def test_samples_are_a_function_of_the_seed(plane):
    run = ebm.load(str(plane))
    a, b, c = run.sample(40, steps=6), run.sample(40, steps=6, seed=1), run.sample(8, steps=6)
    assert a.shape == (40, 2) and a.dtype == torch.float32 and a.device.type == "cpu"
    assert torch.equal(a[:8], c) and not torch.equal(a, b)
    with pytest.raises(ConfigError, match="num_classes=null"):
        run.sample(4, steps=1, labels=1)


def test_a_run_whose_chains_start_in_a_mixture(digits, tmp_path):
    arguments = command(1, tmp_path / "run", digits, train__steps=2, sampler__start="mixture", sampler__bounds="[-2,2]")
    finish(arguments, tmp_path / "log")
    run = ebm.load(tmp_path / "run")
    data, _ = read_states(str(digits), run.config)
    x, data = run.sample(512, steps=0), to_states(data).flatten(1)
    torch.testing.assert_close(x.flatten(1).mean(0), data.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(torch.cov(x.flatten(1).T), torch.cov(data.T), atol=0.2, rtol=0)
    assert torch.equal(run.sample(8, steps=0), x[:8])


def test_a_sampler_made_from_a_run_carries_its_bounds_and_clamp(tmp_path):
    """Equal to the run's chains by the functions that training uses; and another kind of chain is refused."""
    settings = ["sampler.step_size=20", "sampler.grad_clamp=0.02", "sampler.noise_scale=0.01", "data.shards=/nowhere"]
    settings.append("loss.negatives=noise")
    run = ebm.load(make_run(tmp_path / "run", *settings, "sampler.bounds=[-0.5,0.75]"))
    sampler = run.dynamics()
    assert (sampler.step_size, sampler.grad_clamp, sampler.bounds) == (20.0, 0.02, (-0.5, 0.75))
    assert sampler.temperature == pytest.approx(run.temperature)
    x0 = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.4
    x = sampler.sample_chain(initial_points=x0, n_steps=3, generator=torch.Generator().manual_seed(1))
    wanted, _ = langevin(
        run.network, x0, generator=torch.Generator().manual_seed(1), **settings_of(run.config.sampler, 3)
    )
    torch.testing.assert_close(x, wanted)
    assert x.min() >= -0.5 and x.max() <= 0.75 and (x - x0).abs().max() <= 3 * (20 * 0.02 + 0.06)
    mala = ["sampler.kind=mala", "sampler.temperature=1", "data.shards=/nowhere", "loss.negatives=noise"]
    with pytest.raises(ConfigError, match=r"sampler\.kind=mala"):
        ebm.load(make_run(tmp_path / "mala", *mala)).dynamics()


def test_labels_of_a_conditional_run(tmp_path):
    settings = ["energy.num_classes=10", "energy.features=[4,8]", "data.shards=/nowhere", "loss.negatives=noise"]
    run = ebm.load(make_run(tmp_path / "run", *settings))
    ones = run.sample(33, steps=2, labels=1)
    assert torch.equal(ones, run.sample(33, steps=2, labels=[1] * 33)) and ones.shape == (33, 1, 8, 8)
    assert not torch.equal(ones, run.sample(33, steps=2))
    torch.testing.assert_close(run.energy(ones), -torch.logsumexp(-run.class_energies(ones), 1))
    torch.testing.assert_close(run.energy(ones, torch.full((33,), 1)), run.class_energies(ones)[:, 1])
    for wrong in (10, [1, 2], -1):
        with pytest.raises(ConfigError, match="from 0 to 9"):
            run.sample(33, steps=1, labels=wrong)


def test_no_score_without_noise(tmp_path):
    run = ebm.load(make_run(tmp_path / "run", *PLANE, "sampler.temperature=0", "data.shards=/nowhere",
                            "loss.negatives=noise"))  # fmt: skip
    with pytest.raises(ConfigError, match="temperature 0"):
        run.score(torch.zeros(1, 2))


def test_importing_ebm_is_cheap():
    code = "import ebm, sys; assert ebm.load and not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def test_a_command_does_not_load_what_few_runs_need():
    """Together these take as long to load as torch."""
    slow = "torchvision", "scipy", "sklearn", "wandb"
    code = f"import sys, ebm.commands.score; assert not {set(slow)} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def test_chains_are_read_from_their_files_as_they_are_asked_for(plane):
    run = open_run(plane)
    assert len(run.persistent) == 128 and torch.equal(run.persistent.spread(999)[:, 0] / 2, torch.arange(128.0))
    assert torch.equal(run.persistent.spread(4)[:, 0], torch.tensor([0.0, 64.0, 128.0, 192.0]))
    assert torch.equal(run.persistent.take(torch.tensor([1, 31, 32, 127]))[:, 1], torch.tensor([3.0, 63.0, 65.0, 255]))
    assert run.persistent.labels(torch.tensor([0, 5])) is None


def test_persistent_chains_over_noise_levels_are_sampled_at_the_lowest(tmp_path):
    chains = torch.randn(64, 2, 8, 8)
    low, high = math.log(0.1**2), math.log(3.0**2)
    chains[:, 1] = torch.linspace(low, high, 32).repeat(2)[:, None, None]
    settings = ["energy.noise_conditional={}", "energy.features=[4,8]", "sampler.kind=noise_levels", "buffer.size=64"]
    settings += ["loss.kind=dual_score_matching", "loss.contrastive_weight=0.01", "data.shards=/nowhere"]
    run = open_run(make_run(tmp_path / "run", *settings, "train.batch_size=64", "data.noise_std=0", chains=chains))
    assert torch.equal(run.persistent.spread(9), chains[[0, 32], :1]) and run.data_noise == pytest.approx(0.1)
    assert run.sample(3, steps=2).shape == (3, 1, 8, 8) and run.energy(run.persistent.spread(9)).shape == (2,)
    torch.testing.assert_close(run.score(chains[:2, :1]), -run.gradient(chains[:2, :1]))


def test_a_run_of_recovery_over_levels_is_of_the_lowest(tmp_path):
    settings = ["energy.noise_conditional.initialiser.features=[4,8]", "energy.features=[4,8]", "energy.num_classes=10"]
    settings += ["loss.kind=recovery", "loss.levels=3", "sampler.kind=mala", "sampler.bounds=null", "data.noise_std=0"]
    run = open_run(make_run(tmp_path / "run", *settings, "sampler.num_steps=2", "data.shards=/nowhere"))
    assert run.data_noise == run.chain_noise == pytest.approx(0.1) and run.temperature == 1
    assert run.config.fresh_sampler.length == 6
    states, labels = run.chains(12, [3, 8], labels=7)
    assert states[3].shape == states[8].shape == (12, 1, 8, 8) and labels.tolist() == [7] * 12
    x, low = states[8], torch.full((12,), 2 * math.log(0.1))
    torch.testing.assert_close(run.energy(x, labels), run.network(with_noise_level(x, low), labels))
    torch.testing.assert_close(run.score(x, labels), -run.gradient(x, labels))
    assert run.continued(x, 2, labels=labels).shape == x.shape
    with pytest.raises(ConfigError, match="dual_score_matching"):  # levels have constants of their own
        run.log_normaliser(x)


MEMORY = """
import resource, sys, torch
from ebm.inference.run import open_run
run = open_run(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert run.persistent.spread(64).shape == (64, 1, 8, 8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_few_chains_of_a_large_buffer_take_little_memory(tmp_path):
    """200 MB of chains. (All of it went to memory, and to the device.)"""
    size = 800_000
    run = make_run(tmp_path / "run", f"buffer.size={size}", "energy.features=[4,8]", "data.shards=/nowhere",
                   chains=torch.zeros(size, 1, 8, 8))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", MEMORY, str(run)], cwd=ROOT, env=environment(), check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert float(done.stdout) < 60


def test_chains_outlive_their_checkpoint(plane):
    """Training prunes checkpoints while others read them."""
    run = open_run(plane)
    for file in run.checkpoint.glob("stream_*"):
        file.unlink()
    assert run.persistent.spread(1000).shape == (128, 2)


def test_a_run_can_be_opened_while_training_prunes_it(plane):
    """A new checkpoint is made, then the one before goes, again and again, as training does it."""
    root, done, failed = plane / "checkpoints", threading.Event(), []

    def train():
        step = 1
        try:
            while not done.is_set():
                old, new = (root / f"step_{number:08d}" for number in (step, step + 1))
                shutil.copytree(old, root / "copy.tmp")
                (root / "copy.tmp").rename(new)
                old.rename(root / "old.gone.tmp")
                shutil.rmtree(root / "old.gone.tmp")
                step += 1
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        steps = {open_run(plane).step for _ in range(40)}
    finally:
        done.set()
        thread.join()
    assert not failed and len(steps) > 5


def test_chains_that_a_run_should_have_and_has_not(plane, tmp_path, capsys):
    """The config says what should be there. (A glob found nothing, and the metrics were left out in silence.)"""
    checkpoint = next((plane / "checkpoints").iterdir())
    for file in checkpoint.glob("stream_*"):
        file.unlink()
    files = json.loads((checkpoint / "manifest.json").read_text())
    files["files"] = {name: entry for name, entry in files["files"].items() if not name.startswith("stream")}
    (checkpoint / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(DataError, match="stream_0000"):
        open_run(plane)
    assert main(["evaluate", str(plane), "--metrics", "density"]) == 4
    assert "stream_0000" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "sample", "score", "report"])
def test_a_device_that_is_not_there(plane, command, tmp_path, capsys):
    more = {"sample": ["--out", "x.npy"], "score": ["--data", "x.npy", "--out", "y.npy"]}.get(command, [])
    for name in ("nonsense", "meta", "privateuseone", *([] if torch.cuda.is_available() else ["cuda"])):
        assert main([command, str(plane), "--device", name, *more]) == 2
        assert f"--device {name}" in capsys.readouterr().err


@pytest.mark.parametrize("config", [
    LangevinConfig(step_size=0.01, noise_scale=0.1),
    LangevinConfig(step_size=0.01, step_size_end=0.001, schedule="linear", noise_scale=0.1),
    MALAConfig(), TemperingConfig(),
], ids=["langevin", "schedule", "mala", "tempering"])  # fmt: skip
def test_chains_of_several_lengths_are_those_of_each(config):
    def energy(x):
        return x.square().flatten(1).sum(1)

    moved = []
    states, labels = chains_of_lengths(energy, config, (3,), 50, (7, 130, 5), seed=1, moved=moved.append)
    assert labels is None and list(states) == [5, 7, 130]
    for length, x in states.items():
        assert torch.equal(x, fresh_chains(energy, config, (3,), 50, length, seed=1)[0])
    assert sum(moved) == 64 * (130 if can_be_continued(config) else 142)


def test_the_share_of_initial_weights_in_the_average_is_said(tmp_path, caplog, capsys):
    settings = ("loss.negatives=noise", "optim.ema_decay=0.9", "optim.ema_warmup=false")
    run = make_run(tmp_path / "run", *settings)
    open_run(run, "cpu")
    assert "the averaged weights of step 1 are still 90% the initial ones" in caplog.text
    caplog.clear()
    open_run(run, "cpu", "raw")
    assert "initial" not in caplog.text
    assert main(["doctor", str(run)]) == 0 and "still 90% the initial ones" in capsys.readouterr().out
