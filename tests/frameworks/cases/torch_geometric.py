"""PyTorch Geometric: its convolutions have linear layers of their own, which are no nn.Linear."""

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, GCNConv, global_mean_pool

from tests.frameworks.case import Case

DRAW = torch.Generator().manual_seed(0)


def graph() -> Data:
    edges = torch.randint(8, (2, 24), generator=DRAW)
    x = torch.randn(8, 6, generator=DRAW)
    return Data(x=x, edge_index=edges, y=x.prod(1).sum()[None])


GRAPHS = [graph() for _ in range(32)]


class LitGraphs(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one = GCNConv(6, 32)
        self.other = GATConv(32, 16, heads=2)
        self.head = nn.Linear(32, 1)

    def forward(self, batch: Data) -> Tensor:
        x = self.one(batch.x, batch.edge_index).relu()
        x = self.other(x, batch.edge_index).relu()
        return self.head(global_mean_pool(x, batch.batch))[:, 0]

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch), batch.y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Graphs(Case):
    arguments: ClassVar = {"target_parameters": ["one.lin.weight", "other.lin.weight"]}

    def new(self) -> LitGraphs:
        return LitGraphs()

    def data(self) -> Any:
        return DataLoader(GRAPHS, batch_size=8, shuffle=True)

    def predict(self, model: LitGraphs) -> Tensor:
        return model(Batch.from_data_list(GRAPHS))


CASES = {"GCN, GAT": Graphs}
