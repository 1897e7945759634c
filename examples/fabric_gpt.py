"""A small GPT on text, in Fabric's style, with two workers on a CPU: python examples/fabric_gpt.py.

The text comes with Python: the reference of the language, as `help("topics")` shows it. Stop it and go on:
`--resume logs/fabric_gpt/last.ckpt`. Compare with `--strategy ddp`.
"""

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import torch
from lightning.fabric.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import lightning_adpsgd  # noqa: F401 - registers the strategy's names
from lightning_adpsgd.fabric import CommunicationMonitor

CONTEXT = 64  # characters


class Windows(Dataset):
    """Windows of a text, as input and target: both int64, shape (CONTEXT,)."""

    def __init__(self, codes: Tensor, stride: int) -> None:
        self.codes, self.stride = codes, stride

    def __len__(self) -> int:
        """How many there are."""
        return (len(self.codes) - 1 - CONTEXT) // self.stride

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The characters of one, and those that follow each of them."""
        window = self.codes[index * self.stride : index * self.stride + CONTEXT + 1]
        return window[:-1], window[1:]


def read() -> tuple[Windows, Windows, int]:
    """Text to train on, text to validate with, and the number of characters."""
    text = "\n".join(text for _, text in sorted(topics.items()))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    split = len(codes) * 9 // 10
    return Windows(codes[:split], 32), Windows(codes[split:], 10 * CONTEXT), len(alphabet)


class GPT(nn.Module):
    """A decoder of characters; nothing in it knows how it is distributed."""

    def __init__(self, characters: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Characters (N, T) to logits of the following ones (N, T, characters)."""
        length = codes.shape[1]
        hidden = self.characters(codes) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy per character, in nats."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def rate_factor(step: int, steps: int) -> float:
    """What the learning rate is multiplied by: it rises over a tenth of the run, and falls along a cosine."""
    return min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


@torch.no_grad()
def validate(fabric: L.Fabric, model: nn.Module, loader: DataLoader) -> float:
    """The loss of the average of all workers' models, each on its share of the text."""
    if hasattr(fabric.strategy, "average"):
        fabric.strategy.average("validation")
    model.eval()
    losses = torch.stack([loss_of(model, batch) for batch in loader])
    model.train()
    return float(fabric.all_reduce(losses.mean()))


def main() -> None:
    """Train, validate after every epoch, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="adpsgd_int4", help="adpsgd_int4, adpsgd or ddp")
    parser.add_argument("--workers", default=2, type=int, help="processes on this machine's CPU")
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("--steps", default=150, type=int, help="of an epoch")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    arguments = parser.parse_args()

    fabric = L.Fabric(
        strategy=arguments.strategy,
        accelerator="cpu",
        devices=arguments.workers,
        callbacks=[CommunicationMonitor()],
        loggers=CSVLogger("logs", name="fabric_gpt"),
    )
    fabric.launch()
    fabric.seed_everything(1)

    train, val, characters = read()
    model = GPT(characters)
    steps = arguments.epochs * arguments.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps))
    if hasattr(fabric.strategy, "set_total_steps"):
        fabric.strategy.set_total_steps(steps)
    model, optimizer = fabric.setup(model, optimizer)
    train_loader = fabric.setup_dataloaders(DataLoader(train, batch_size=16, shuffle=True, drop_last=True))
    val_loader = fabric.setup_dataloaders(DataLoader(val, batch_size=16))

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
    if arguments.resume:
        fabric.load(arguments.resume, state)
    for epoch in range(state["epoch"], arguments.epochs):
        train_loader.sampler.set_epoch(epoch)
        for _, batch in zip(range(arguments.steps), train_loader, strict=False):
            optimizer.zero_grad()
            fabric.backward(loss_of(model, batch))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            scheduler.step()
        loss = validate(fabric, model, val_loader)
        fabric.print(f"epoch {epoch + 1}: validation loss {loss:.3f}")
        state["epoch"] = epoch + 1
        fabric.save(Path("logs/fabric_gpt/last.ckpt"), state)
    fabric.call("on_train_end")


if __name__ == "__main__":
    main()
