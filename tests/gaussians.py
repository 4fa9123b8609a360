"""Gaussian data and the quadratic energy that must find it: what the tests of losses share. All in float64."""

import torch
from torch import Tensor, nn

MEAN = torch.tensor([0.7, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def standard(num: int, dim: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """N(0, I) draws, shifted and turned so that their own mean is 0 and their covariance I, exactly."""
    z = torch.randn(num, dim, dtype=torch.float64, generator=generator or seeded())
    z = z - z.mean(0)
    factor = torch.linalg.cholesky(z.T @ z / num)
    return torch.linalg.solve_triangular(factor, z.T, upper=False).T


def gaussian(num: int, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE, generator=None) -> Tensor:
    """Draws whose own mean and covariance are these: no estimate from them has sampling error in either."""
    return mean + standard(num, len(mean), generator) @ torch.linalg.cholesky(covariance).T


class Quadratic(nn.Module):
    """E(x) = (x - mean)' precision (x - mean) / 2 + bias, all of it free; begins far from the data."""

    def __init__(self, dim: int = 2, dtype=torch.float64):
        super().__init__()
        self.mean = nn.Parameter(torch.full((dim,), -0.5, dtype=dtype))
        self.matrix = nn.Parameter(2 * torch.eye(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))

    @property
    def precision(self) -> Tensor:
        return (self.matrix + self.matrix.T) / 2

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        return (centred @ self.precision * centred).sum(1) / 2 + self.bias


class Network(nn.Module):
    """A smooth energy of states of any shape with `dim` components, in float64, its weights a function of `seed`."""

    def __init__(self, dim: int = 2, seed: int = 0):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(dim, 8), nn.SiLU(), nn.Linear(8, 1)).double()
        g = seeded(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(1)


def at(mean: Tensor, precision: Tensor, bias: float = 0.0) -> Quadratic:
    energy = Quadratic(len(mean), mean.dtype)
    with torch.no_grad():
        energy.mean.copy_(mean)
        energy.matrix.copy_(precision)
        energy.bias.fill_(bias)
    return energy


def minimise(loss, parameters, steps: int = 60) -> None:
    """Full-batch L-BFGS on `loss()`, which must be the same function at every call."""
    optimizer = torch.optim.LBFGS(list(parameters), max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def follow(loss, parameters, steps: int = 400, lr: float = 0.05) -> None:
    """Adam on losses whose gradient alone has a meaning: their samples move with the energy."""
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def assert_found(energy: Quadratic, precision: Tensor, mean: Tensor = MEAN, tolerance: float = 0.03) -> None:
    """Mean, as a share of the standard deviation, and precision, as a share of its norm, within 3 %."""
    deviation = torch.linalg.inv(precision).diagonal().sqrt()
    wrong_mean = ((energy.mean - mean).abs() / deviation).max().item()
    wrong_precision = ((energy.precision - precision).norm() / precision.norm()).item()
    assert wrong_mean < tolerance and wrong_precision < tolerance, (wrong_mean, wrong_precision)
