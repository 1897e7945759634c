"""The temporal fusion transformer of `pytorch-forecasting`, on made-up sales."""

import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import QuantileLoss

from tests.clients.harness import Client, run

SHOPS, DAYS = 16, 120


def sales() -> pd.DataFrame:
    """Of some shops: a weekly pattern, a trend, and noise."""
    random = np.random.default_rng(0)
    day = np.arange(DAYS)
    shops = []
    for shop in range(SHOPS):
        week = 1 + 0.5 * np.sin(2 * np.pi * (day + shop) / 7)
        sold = (10 + shop) * week * (1 + day / DAYS) + random.normal(0, 1, DAYS)
        weekday = pd.Series(day % 7).astype(str).astype("category")
        shops.append(pd.DataFrame({"shop": str(shop), "day": day, "weekday": weekday, "sold": sold}))
    return pd.concat(shops, ignore_index=True)


def client() -> Client:
    data = sales()
    training = TimeSeriesDataSet(
        data[data.day < DAYS - 7],
        time_idx="day",
        target="sold",
        group_ids=["shop"],
        max_encoder_length=14,
        max_prediction_length=7,
        static_categoricals=["shop"],
        time_varying_known_reals=["day"],
        time_varying_known_categoricals=["weekday"],
        time_varying_unknown_reals=["sold"],
        target_normalizer=GroupNormalizer(groups=["shop"]),
    )
    validation = TimeSeriesDataSet.from_dataset(training, data, predict=True, stop_randomization=True)
    module = TemporalFusionTransformer.from_dataset(
        training,
        learning_rate=0.03,
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        dropout=0.1,
        loss=QuantileLoss(),
    )
    held_out = validation.to_dataloader(train=False, batch_size=SHOPS)

    @torch.no_grad()
    def loss() -> float:
        module.eval()
        inputs, target = next(iter(held_out))
        return QuantileLoss()(module(inputs).prediction, target).item()

    loader = training.to_dataloader(train=True, batch_size=16)
    return Client(module, loader, loss, {"max_epochs": 8, "gradient_clip_val": 0.1}, validation=held_out)


if __name__ == "__main__":
    run(client, ("pytorch-forecasting",))
