"""Local SGD with an adaptive period in a plain PyTorch loop, without Lightning.

Start one process per worker: torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_adpsgd import AdaptivePeriod, AveragingRound, LocalSGD


def main(epochs: int = 10) -> None:
    """Train on handwritten digits, every worker on its own share; print each round on the first."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, test = TensorDataset(images[:1440], labels[:1440]), (images[1440:], labels[1440:])
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=32, sampler=sampler, drop_last=True)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[epochs // 2], gamma=0.1)

    # The two things to add: this object, and a call after each step of the optimizer.
    local_sgd = LocalSGD(optimizer, AdaptivePeriod(), module=model, total_steps=epochs * len(loader))
    local_sgd.broadcast()
    if dist.get_rank() == 0:
        local_sgd.subscribe(report)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            local_sgd.step()
        scheduler.step()

    local_sgd.average()  # from here on the model is the average
    accuracy = (model(test[0]).argmax(dim=1) == test[1]).float().mean().item()
    print(f"rank {dist.get_rank()}: test accuracy {accuracy:.4f}")
    dist.destroy_process_group()


def report(round_: AveragingRound) -> None:
    """Print a round."""
    print(
        f"step {round_.step:4}  period {round_.period:2}  variance {round_.variance:.2e}"
        f"  variance/lr {round_.ratio:.2e}  sent {round_.sent_bytes} bytes"
    )


if __name__ == "__main__":
    main()
