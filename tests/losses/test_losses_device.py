"""Every kind of loss on a device: no wait for the host, and no float16 in a gradient inside it."""

from typing import get_args

import pytest
import torch
from gaussians import Network
from test_losses_kinds import CHAIN, Classifier, batch
from torch.utils._python_dispatch import TorchDispatchMode

from ebm.config.losses import LossConfig
from ebm.energies import LatentEnergy, MLPEnergyFunction, NoiseConditionalEnergy, with_noise_level
from ebm.energies.base import PLANES
from ebm.losses import loss_of
from ebm.streams import normal_

KINDS = {kind.model_fields["kind"].default: kind for kind in get_args(get_args(LossConfig)[0])}
OPTIONS = {  # further settings of a kind that take another way through its code
    "contrastive": [{"gradient_penalty": 0.1, "gradient_penalty_at": "interpolates"}],
    "improved_contrastive": [{"kl_steps": 2}],
    "score_matching": [{"method": "exact"}, {"method": "sliced"}, {"method": "sliced", "variance_reduction": False}],
    "noise_contrastive": [{"noise": "uniform", "noise_bounds": (-9.0, 9.0)}],
    "energy_discrepancy": [{"stabiliser": 0.0}],
    "dual_score_matching": [{"contrastive_weight": 0.1}],
    "jem": [{"joint": True, "gradient_penalty": 0.1}],
}
# The pairing of the flow runs on the host by design (ebm.losses.flow_matching.pairing): only the rest is asked.
NO_WAIT = {"energy_matching": {"flow_weight": 0.0, "warmup_steps": 0}}
assert "contrastive" in KINDS and OPTIONS.keys() <= KINDS.keys()
CASES = [(kind, options) for kind in KINDS for options in [{}, *OPTIONS.get(kind, [])]]


def energy_for(kind: str):
    if kind == "contrastive_latent":
        return LatentEnergy(MLPEnergyFunction(2, 8), MLPEnergyFunction(2, 8), 4).double()
    if kind != "dual_score_matching":
        return Classifier()
    return NoiseConditionalEnergy(MLPEnergyFunction(2 + PLANES, 8, num_classes=3), (2,)).double()


def computed(kind: str, options: dict, energy, device: str = "cpu", dtype: torch.dtype = torch.float64):
    """The function that computes the loss, with all its tensors on the device already."""
    x_pos, x_neg, y_pos, y_neg = (t.to(device) for t in batch())
    x_pos, x_neg = x_pos.to(dtype), x_neg.to(dtype)
    chain = CHAIN | {"bounds": (-9.0, 9.0), "boundary": "reflect"}
    if kind == "dual_score_matching":
        x_neg = with_noise_level(x_neg, torch.zeros(len(x_neg), device=device))
        chain |= {"log_variances": (-2.0, -1.0, 0.0), "lowest_share": 0.5}
    generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]
    loss = loss_of(KINDS[kind](**options), lambda x, g: x + normal_(torch.empty_like(x), g))
    settings = {"y_pos": y_pos, "y_neg": y_neg, "generator": generators, "chain": chain}
    return lambda: loss(energy, x_pos, x_neg, step=5, **settings)


class HostTraffic(TorchDispatchMode):
    """Lists the operations that read a tensor on the host, or make one from data of the host."""

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.lift_fresh,
        torch.ops.aten.lift_fresh_copy,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.equal,
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func.overloadpacket is torch.ops.aten.index and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or func.overloadpacket in self.READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.new_tensor((0.1, 0.2)),
        lambda x: torch.as_tensor(0.1, dtype=x.dtype),
        lambda x: torch.tensor([1.0]),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: bool(x.sum() > 0),
    ],
)
def test_traffic_with_the_host_is_noticed(operation):
    with HostTraffic() as traffic:
        operation(torch.ones(3))
    assert traffic.found


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_loss_has_no_traffic_with_the_host(kind, options):
    loss = computed(kind, options | NO_WAIT.get(kind, {}), energy_for(kind))
    with HostTraffic() as traffic:
        loss()
    assert traffic.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_loss_never_waits_for_the_device(kind, options):
    energy = energy_for(kind).cuda()
    loss = computed(kind, options | NO_WAIT.get(kind, {}), energy, "cuda")
    loss().loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss().loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_gradients_inside_a_loss_are_never_float16(kind, options, monkeypatch):
    """No loss scale reaches them. The energy whose gradient is taken runs without float16 autocast too."""
    energy, inner = energy_for(kind).float(), []
    grad = torch.autograd.grad

    def watched(*args, **kwargs):
        assert not torch.is_autocast_enabled("cpu")
        inner.append(grad(*args, **kwargs))
        return inner[-1]

    def of_states(module, inputs):
        if inputs[0].requires_grad:
            assert not torch.is_autocast_enabled("cpu")

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for part in energy.modules():
        if isinstance(part, Network | MLPEnergyFunction):
            part.register_forward_pre_hook(of_states)
    with torch.autocast("cpu", torch.float16):
        output = computed(kind, options, energy, dtype=torch.float32)()
        assert torch.is_autocast_enabled("cpu")
    assert all(g.dtype == torch.float32 for (g,) in inner)
    assert output.loss.dtype == torch.float32
