"""A language model of `transformers`, built from its configuration, with tied embeddings and a schedule of its own."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

from tests.clients.harness import Client, run

WORDS, LENGTH = 64, 32


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=WORDS, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
            )
        )

    def training_step(self, batch: tuple[Tensor]) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sentences(size: int, seed: int) -> TensorDataset:
    """A Markov chain: after each word one of four may follow."""
    following = torch.randint(WORDS, (WORDS, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(WORDS, (size,), generator=generator)]
    for _ in range(LENGTH - 1):
        words.append(following[words[-1], torch.randint(4, (size,), generator=generator)])
    return TensorDataset(torch.stack(words, dim=1))


def client() -> Client:
    module = LanguageModel()
    (held_out,) = sentences(256, seed=2).tensors

    @torch.no_grad()
    def loss() -> float:
        return module.eval().model(input_ids=held_out, labels=held_out).loss.item()

    loader = DataLoader(sentences(4096, seed=1), batch_size=16, shuffle=True, drop_last=True)
    return Client(module, loader, loss, {"max_epochs": 2, "gradient_clip_val": 1.0})


if __name__ == "__main__":
    run(client, ("transformers",))
