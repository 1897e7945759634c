"""A generative adversarial network in the shape of Lightning's own example: two optimizers that are toggled by hand."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.harness import Client, run

SIDE, NOISE = 8, 16


def generator_network() -> nn.Sequential:
    """With BatchNorm, from noise to pictures."""
    return nn.Sequential(
        nn.Linear(NOISE, 64),
        nn.LeakyReLU(0.2),
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, SIDE * SIDE),
        nn.Tanh(),
    )


def discriminator_network() -> nn.Sequential:
    """From pictures to one logit."""
    return nn.Sequential(
        nn.Linear(SIDE * SIDE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
    )


class GAN(L.LightningModule):
    """Each batch trains the generator, then the discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator_network(), discriminator_network()

    def judged(self, pictures: Tensor, real: bool) -> Tensor:
        """The loss of the discriminator's verdicts, if the right one is ``real``."""
        verdicts = self.discriminator(pictures)
        return F.binary_cross_entropy_with_logits(verdicts, torch.full_like(verdicts, float(real)))

    def training_step(self, batch: tuple[Tensor]) -> None:
        (pictures,) = batch
        for_generator, for_discriminator = self.optimizers()
        noise = torch.randn(len(pictures), NOISE)

        self.toggle_optimizer(for_generator)
        for_generator.zero_grad()
        self.manual_backward(self.judged(self.generator(noise), real=True))
        for_generator.step()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        for_discriminator.zero_grad()
        fakes = self.generator(noise).detach()
        self.manual_backward((self.judged(pictures, real=True) + self.judged(fakes, real=False)) / 2)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999))
            for part in (self.generator, self.discriminator)
        ]


def spots(size: int, seed: int) -> Tensor:
    """Pictures of one round spot each, anywhere in the middle."""
    places = 2 + 3 * torch.rand(size, 2, 1, generator=torch.Generator().manual_seed(seed))
    near = torch.exp(-((torch.arange(SIDE) - places) ** 2) / 3)
    return (near[:, 0, :, None] * near[:, 1, None, :]).flatten(1) * 2 - 1


def energy_distance(ours: Tensor, theirs: Tensor) -> float:
    """Of two samples of pictures; 0 if they come from one distribution."""
    apart = torch.cdist(ours, theirs).mean() * 2 - torch.cdist(ours, ours).mean() - torch.cdist(theirs, theirs).mean()
    return apart.item()


def client() -> Client:
    module = GAN()

    @torch.no_grad()
    def loss() -> float:
        noise = torch.randn(1000, NOISE, generator=torch.Generator().manual_seed(3))
        return energy_distance(module.eval().generator(noise), spots(1000, seed=2))

    loader = DataLoader(TensorDataset(spots(4096, seed=1)), batch_size=32, shuffle=True, drop_last=True)
    return Client(module, loader, loss, {"max_epochs": 10})


if __name__ == "__main__":
    run(client, ("lightning",))
