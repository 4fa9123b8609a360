"""Message passing (Gilmer et al. 2017) between neighbouring pixels of an image, or between the points of a set. Default
sizes are those of the config (ebm.config.energies)."""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm.config.energies import GraphConfig
from ebm.energies.base import require_batch
from ebm.energies.networks import NetworkEnergy, NetworkOptions, make_activation, sum_over

GRAPH = GraphConfig()
# (row, column) of the eight neighbours of a pixel, relative to it
OFFSETS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


class Graph(NamedTuple):
    """N nodes with K neighbours each."""

    neighbours: Callable[[Tensor], Tensor]  # features of all nodes (B, N, D) -> of each node's neighbours (B, N, K, D)
    edges: Tensor  # edge features (..., N, K, E): the position of the neighbour relative to the node
    weights: Tensor  # (..., N, K, 1), the weight of each message


class MessageLayer(nn.Module):
    """h_i <- h_i + U([h_i, sum_j w_ij a(A h_i + B h_j + C e_ij)]), where `a` is the activation, U a network with one
    hidden layer, and A, B, C are linear."""

    def __init__(self, dim: int, edge_dim: int, activation: str):
        super().__init__()
        self.activation = make_activation(activation)
        self.own, self.other = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.edge = nn.Linear(edge_dim, dim, bias=False)
        self.update = nn.Sequential(nn.Linear(2 * dim, dim), make_activation(activation), nn.Linear(dim, dim))

    def forward(self, h: Tensor, graph: Graph) -> Tensor:
        messages = self.own(h)[:, :, None] + graph.neighbours(self.other(h)) + self.edge(graph.edges)
        received = (graph.weights * self.activation(messages)).sum(2)
        update: Tensor = self.update(torch.cat([h, received.to(h.dtype)], 2))
        return h + update


class GraphEnergy(NetworkEnergy):
    """`num_layers` rounds of messages between nodes, then the sum of the nodes' features. The energy depends on the
    order of the nodes only through the edges. A subclass defines `nodes_and_graph`. `options`: see
    NetworkEnergy.finish."""

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        hidden_dim: int = GRAPH.hidden_dim,
        num_layers: int = GRAPH.num_layers,
        *,
        activation: str = GRAPH.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__()
        self.embed = nn.Linear(node_dim, hidden_dim)
        self.layers = nn.ModuleList(MessageLayer(hidden_dim, edge_dim, activation) for _ in range(num_layers))
        self.activation = make_activation(activation)
        self.finish(hidden_dim, **options)

    @abstractmethod
    def nodes_and_graph(self, x: Tensor) -> tuple[Tensor, Graph]:
        """States (B, *shape) -> the features of the nodes (B, N, node_dim), and which nodes send messages to which."""

    def features(self, x: Tensor) -> Tensor:
        nodes, graph = self.nodes_and_graph(x)
        h = self.embed(nodes)
        for layer in self.layers:
            h = layer(h, graph)
        return sum_over(self.activation(h), 1)


class PixelGraphEnergyFunction(GraphEnergy):
    """E(x) of images (B, channels, height, width). A node is a pixel; its features are the pixel's values and its
    place. It receives the mean of the messages of its neighbours, of which it has eight, or fewer at the edges of the
    image. `options`: see NetworkEnergy.finish."""

    places: Tensor  # (1, N, 2), row and column of each pixel from -1 to 1
    offsets: Tensor  # (8, 2)
    weights: Tensor  # (1, N, 8, 1)

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        hidden_dim: int = GRAPH.hidden_dim,
        num_layers: int = GRAPH.num_layers,
        *,
        activation: str = GRAPH.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__(channels + 2, 2, hidden_dim, num_layers, activation=activation, **options)
        self.shape = (channels, height, width)
        places = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("places", torch.stack(places, 2).reshape(1, -1, 2), persistent=False)
        self.register_buffer("offsets", torch.tensor(OFFSETS, dtype=torch.float32), persistent=False)
        exists = self._neighbours(torch.ones(1, height * width, 1))
        self.register_buffer("weights", exists / exists.sum(2, keepdim=True), persistent=False)

    def nodes_and_graph(self, x: Tensor) -> tuple[Tensor, Graph]:
        pixels = require_batch(x, self.shape).flatten(2).transpose(1, 2)
        nodes = torch.cat([pixels, self.places.expand(len(x), -1, -1)], 2)
        return nodes, Graph(self._neighbours, self.offsets, self.weights)

    def _neighbours(self, h: Tensor) -> Tensor:
        """The neighbours' features, (B, N, D) -> (B, N, 8, D), with zeros for those outside of the image. Shifting the
        image is faster than a gather, and its backward is deterministic."""
        _, height, width = self.shape
        padded = F.pad(h.reshape(len(h), height, width, -1), (0, 0, 1, 1, 1, 1))
        shifted = [padded[:, 1 + r : 1 + r + height, 1 + c : 1 + c + width] for r, c in OFFSETS]
        return torch.stack(shifted, 3).flatten(1, 2)


class PointGraphEnergyFunction(GraphEnergy):
    """E(x) of sets of `num_points` points in R^point_dim, given as (B, num_points, point_dim) or flattened. The energy
    is the same for every order of the points.

    A point receives the mean of the messages of all points, or messages of its `neighbours` nearest points. A near
    point at distance d has weight (1 - (d / d')^2)^2, where d' is the distance of the nearest point that sends no
    message: so the energy is continuous where one neighbour takes the place of another. `options`: see
    NetworkEnergy.finish.

    Raises ValueError unless `neighbours` is null or from 1 to num_points - 2.
    """

    def __init__(
        self,
        num_points: int,
        point_dim: int = GRAPH.point_dim,
        hidden_dim: int = GRAPH.hidden_dim,
        num_layers: int = GRAPH.num_layers,
        neighbours: int | None = GRAPH.neighbours,
        *,
        activation: str = GRAPH.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__(point_dim, point_dim + 1, hidden_dim, num_layers, activation=activation, **options)
        if neighbours is not None and not 1 <= neighbours <= num_points - 2:
            raise ValueError(
                f"neighbours={neighbours} must be from 1 to {num_points - 2}, two below the {num_points} points; "
                "null: all points hear all"
            )
        self.num_points, self.point_dim, self.num_neighbours = num_points, point_dim, neighbours

    def nodes_and_graph(self, x: Tensor) -> tuple[Tensor, Graph]:
        shape = (self.num_points, self.point_dim)
        is_flat = x.ndim == 2 and x.shape[1] == self.num_points * self.point_dim
        points = require_batch(x.reshape(len(x), *shape) if is_flat else x, shape)
        apart = points[:, None] - points[:, :, None]  # (B, N, N, D): from i to j
        squared = apart.square().sum(3, keepdim=True)
        edges = torch.cat([apart, squared], 3)
        if self.num_neighbours is None:
            weights = x.new_full((1, 1, 1), 1 / self.num_points)
            return points, Graph(lambda h: h[:, None], edges, weights)
        return points, _nearest(edges, squared.squeeze(3), self.num_neighbours)


def _nearest(edges: Tensor, squared: Tensor, k: int) -> Graph:
    """The graph in which each point receives messages from its k nearest others. `edges` (B, N, N, E) are those of all
    pairs, `squared` (B, N, N) their squared distances."""
    self_edge = torch.eye(squared.shape[1], dtype=torch.bool, device=squared.device)
    nearest, index = squared.masked_fill(self_edge, torch.inf).topk(k + 1, largest=False)
    beyond = nearest[..., k:].clamp_min(torch.finfo(squared.dtype).tiny)
    weights = (1 - nearest[..., :k] / beyond).square() / k
    index = index[..., :k, None]

    def neighbours(h: Tensor) -> Tensor:
        return h[:, None].expand(-1, h.shape[1], -1, -1).take_along_dim(index, 2)

    return Graph(neighbours, edges.take_along_dim(index, 2), weights[..., None])
