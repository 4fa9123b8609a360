"""No sampler reads device memory on the host, or copies host memory to the device, inside its steps: either waits."""

from itertools import product

import pytest
import torch
from test_metropolis import quartic, seeded
from torch.utils._python_dispatch import TorchDispatchMode

from ebm.config import HMCConfig, LangevinConfig, MALAConfig, TemperingConfig
from ebm.samplers import class_flips, langevin, mala, sampler_of, with_replicas, within_gibbs

SHAPE = (2, 4, 4)
LANGEVIN = {
    "constant": {},
    "linear": {"step_size_end": 0.01, "noise_scale_end": 0.01},
    "cosine": {"step_size_end": 0.01},
    "geometric": {"noise_scale_end": 0.01},
    "flow": {"noise_scale": None, "temperature": 0.1},
}
CONFIGS = [
    LangevinConfig(num_steps=3, step_size=0.1, **{"noise_scale": 0.1} | more, schedule=schedule, boundary=boundary)
    for (schedule, more), boundary in product(LANGEVIN.items(), ("clamp", "reflect"))
]
CONFIGS += [
    kind(num_steps=3, boundary=boundary)
    for kind, boundary in product((MALAConfig, HMCConfig, TemperingConfig), ("reject", "reflect"))
]
NAMES = [f"{config.kind}-{getattr(config, 'schedule', 'adapted')}-{config.boundary}" for config in CONFIGS]


FORBIDDEN = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "lift_fresh"}


class NoHostReads(TorchDispatchMode):
    """Refuses operations that read a tensor's values on the host, whose output has a size that depends on values, or
    that make a tensor out of Python numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, func
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{func} by a mask"
        return func(*args, **(kwargs or {}))


def test_what_would_wait_is_noticed():
    x = torch.ones(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(x.any()),
        lambda: x.new_tensor([1.0, 2.0]),
        lambda: torch.as_tensor([1.0, 2.0]),
        lambda: x[x > 0],
        lambda: torch.equal(x, x + 1),
        lambda: x.nonzero(),
    ):
        with pytest.raises(AssertionError), NoHostReads():
            wait()


def chain(config, device="cpu"):
    """The call of a config's sampler, with everything it takes on the device already."""
    x = with_replicas(config, torch.rand(8, *SHAPE, generator=seeded(1))).to(device)
    step_size = torch.tensor(config.step_size, device=device) if config.adapt else None
    sampler, settings = sampler_of(config, step_size=step_size)
    generators = [torch.Generator(device).manual_seed(stream) for stream in range(2)]
    return lambda: sampler(quartic, x, generator=generators, **settings)


def gibbs(sampler, device="cpu"):
    x, y = torch.rand(8, *SHAPE, generator=seeded(1)).to(device), (torch.arange(8) % 3).to(device)
    generators = [torch.Generator(device).manual_seed(stream) for stream in range(2)]
    settings = {"num_steps": 2, "step_size": 0.1, **({"noise_scale": 0.1} if sampler is langevin else {})}

    def of_classes(x):
        return torch.stack([quartic(x), quartic(x - 0.5), quartic(x + 0.5)], dim=1)

    def energy(x, y):
        return of_classes(x).gather(1, y[:, None]).squeeze(1)

    def call():
        class_flips(of_classes, x, y, generator=generators)
        return within_gibbs(sampler, energy, of_classes, x, y, rounds=2, generator=generators, **settings)

    return call


CALLS = {name: lambda device="cpu", config=config: chain(config, device)
         for name, config in zip(NAMES, CONFIGS, strict=True)}  # fmt: skip
CALLS |= {f"gibbs-{sampler.__name__}": lambda device="cpu", sampler=sampler: gibbs(sampler, device)
          for sampler in (langevin, mala)}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_chain_reads_nothing_on_the_host(name):
    call = CALLS[name]()
    with NoHostReads():
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
def test_a_chain_never_waits_for_the_device(name):
    call = CALLS[name]("cuda")
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
