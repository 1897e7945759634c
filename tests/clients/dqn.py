"""Reinforcement learning in the shape of Lightning's own example: a replay buffer and a target network, on CartPole."""

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import gymnasium
import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from tests.clients.harness import Client, run

DISCOUNT, STEPS, EPISODE = 0.98, 1500, 100


class Replay(IterableDataset):
    """Samples from the latest experiences, without end."""

    def __init__(self, capacity: int) -> None:
        self.experiences: deque[tuple[Any, ...]] = deque(maxlen=capacity)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        while True:
            yield random.choice(self.experiences)


def network() -> nn.Sequential:
    """From an observation to the value of both actions."""
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


class DQN(L.LightningModule):
    """Plays one move per training step, in an environment of each worker's own."""

    def __init__(self, sync_every: int = 50) -> None:
        super().__init__()
        self.sync_every = sync_every
        self.net, self.target_net = network(), network()
        self.target_net.load_state_dict(self.net.state_dict())
        self.replay = Replay(2000)
        self.env = gymnasium.make("CartPole-v1")
        self.observation: Any = None

    def on_fit_start(self) -> None:
        random.seed(random.random() + self.global_rank)
        self.env.action_space.seed(self.global_rank)
        self.observation, _ = self.env.reset(seed=self.global_rank)
        for _ in range(500):
            self.play(chance=1.0)

    @torch.no_grad()
    def play(self, chance: float) -> None:
        """One move, which is random with this chance."""
        action = int(self.env.action_space.sample())
        if random.random() >= chance:
            action = int(self.net(torch.as_tensor(self.observation)).argmax())
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.replay.experiences.append((self.observation, action, float(reward), terminated, observation))
        self.observation = self.env.reset()[0] if terminated or truncated else observation

    def td_loss(self, batch: list[Tensor]) -> Tensor:
        observations, actions, rewards, ended, following = batch
        values = self.net(observations).gather(1, actions[:, None])[:, 0]
        with torch.no_grad():
            future = self.target_net(following).max(dim=1).values * ~ended
        return F.smooth_l1_loss(values, rewards.float() + DISCOUNT * future)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.play(chance=max(0.05, 1 - self.global_step / 500))
        if self.global_step % self.sync_every == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        return self.td_loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.replay, batch_size=64)


@torch.no_grad()
def mean_return(net: nn.Module, episodes: int = 20) -> float:
    """How many steps the pole stays up, of at most ``EPISODE``; by chance, 22."""
    env, total = gymnasium.make("CartPole-v1", max_episode_steps=EPISODE), 0.0
    for episode in range(episodes):
        observation, _ = env.reset(seed=1000 + episode)
        over = False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(int(net(torch.as_tensor(observation)).argmax()))
            total += float(reward)
            over = terminated or truncated
    return total / episodes


def client() -> Client:
    module = DQN()
    return Client(module, None, lambda: 1 - mean_return(module.net) / EPISODE, {"max_steps": STEPS})


if __name__ == "__main__":
    run(client, ("gymnasium",))
