"""Segmentation with BatchNorm in every block: LR-ASPP on MobileNetV3 of `torchvision`, from scratch."""

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from tests.clients.harness import Client, run

SIDE = 64


class Segmentation(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        for part in self.net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 0.1  # MobileNet's 0.01 is for longer runs

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0])["out"], batch[1])

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def shapes(size: int, seed: int) -> TensorDataset:
    """Noisy pictures of a disk and a square, and the class of each pixel."""
    generator = torch.Generator().manual_seed(seed)
    pictures, classes = torch.zeros(size, 3, SIDE, SIDE), torch.zeros(size, SIDE, SIDE, dtype=torch.long)
    at = torch.arange(SIDE)
    for index in range(size):
        places = torch.randint(12, SIDE - 12, (2, 2), generator=generator)
        away = [torch.stack(torch.meshgrid(at - y, at - x, indexing="ij")).abs() for y, x in places.tolist()]
        classes[index][(away[0] ** 2).sum(dim=0) < 100] = 1
        classes[index][away[1].amax(dim=0) < 10] = 2
    for channel in range(3):
        pictures[:, channel] = (classes == channel).float()
    return TensorDataset(pictures + 0.5 * torch.randn(pictures.shape, generator=generator), classes)


def client() -> Client:
    module = Segmentation()
    held_out = DataLoader(shapes(64, seed=2), batch_size=16)

    @torch.no_grad()
    def loss() -> float:
        module.eval()
        return sum(F.cross_entropy(module.net(x)["out"], y).item() for x, y in held_out) / len(held_out)

    loader = DataLoader(shapes(512, seed=1), batch_size=8, shuffle=True, drop_last=True)
    return Client(module, loader, loss, {"max_epochs": 3})


if __name__ == "__main__":
    run(client, ("torchvision",))
