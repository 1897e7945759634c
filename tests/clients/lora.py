"""Low-rank adapters by `peft` in a frozen model of `transformers`; the base is never sent."""

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.clients.harness import Client, run

WORDS, LENGTH, CLASSES = 64, 16, 4


class Adapted(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        base = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=WORDS,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_labels=CLASSES,
                pad_token_id=0,
            )
        )
        adapters = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
        self.model = get_peft_model(base, adapters)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)


def texts(size: int, seed: int) -> TensorDataset:
    """Each with words of one of four kinds more often than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    words = torch.randint(1, WORDS, (size, LENGTH), generator=generator)
    often = torch.rand(size, LENGTH, generator=generator) < 0.4
    kind = labels[:, None] * (WORDS // CLASSES) + torch.randint(
        1, WORDS // CLASSES, (size, LENGTH), generator=generator
    )
    return TensorDataset(torch.where(often, kind, words), labels)


def client() -> Client:
    module = Adapted()
    inputs, labels = texts(512, seed=2).tensors

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(module.eval().model(input_ids=inputs).logits, labels).item()

    loader = DataLoader(texts(2048, seed=1), batch_size=16, shuffle=True, drop_last=True)
    return Client(module, loader, loss, {"max_epochs": 3})


if __name__ == "__main__":
    run(client, ("peft", "transformers"))
