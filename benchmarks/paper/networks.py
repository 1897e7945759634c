"""Networks of the paper's families: narrow ones, for eight workers on two cores, and those of full size."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from benchmarks.paper.text import CONTEXT
from examples.image_classification.model import ARCHITECTURES

CLASSES = 10
CHARACTERS = 65  # that occur in the text


def new_network(name: str) -> nn.Module:
    """A new network: one of `OF_TEXT`, or for colour images of 32 pixels one of `SMALL` or of the image example."""
    if name in OF_TEXT:
        return OF_TEXT[name]()
    network = SMALL[name]() if name in SMALL else ARCHITECTURES[name](CLASSES, 3)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # He et al. 2015, arXiv:1502.01852
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network.to(memory_format=torch.channels_last)


def _vgg_tiny() -> nn.Module:
    """Five 3x3 convolutions with batch norm between three poolings, and two linear layers; 66 k parameters."""
    features = make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True)
    head = [nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, CLASSES)]
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def _googlenet_tiny() -> nn.Module:
    """Two Inception blocks behind a stem that divides the resolution by four, as GoogLeNet's does; 26 k parameters."""
    return nn.Sequential(
        BasicConv2d(3, 24, kernel_size=3, padding=1, stride=2),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(24, 24, 16, 32, 4, 12, 12),  # 24 + 32 + 12 + 12 = 80 channels
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(80, 32, 24, 48, 6, 16, 16),  # 112
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(112, CLASSES),
    )


def _resnet_tiny() -> nn.Module:
    """ResNet-8 (He et al., arXiv:1512.03385, section 4.2) behind a stem that halves the resolution; 78 k parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers.append(BasicBlock(channels, width, stride, shortcut))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv:2010.11929) for images of 32 pixels, pooled by the mean."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, (32 // patch) ** 2, width), std=0.02))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, classes)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.encoder(tokens).mean(dim=1))


class LanguageModel(nn.Module):
    """A decoder that predicts the next character (Radford et al. 2018), with positions learned."""

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, width)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(CONTEXT, width), std=0.02))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CHARACTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters (N, T) to logits (N, characters, T), where a logit depends on no later character than its own."""
        length = characters.shape[1]
        hidden = self.embed(characters) + self.position[:length]
        hidden = self.decoder(hidden, mask=self.mask[:length, :length], is_causal=True)
        return self.head(hidden).transpose(1, 2)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "vgg_tiny": _vgg_tiny,
    "googlenet_tiny": _googlenet_tiny,
    "resnet_tiny": _resnet_tiny,
    "vit_tiny": VisionTransformer,
    "vit_small": lambda: VisionTransformer(width=192, depth=9, heads=3),
}
"""Of images, by name; all but ``vit_small`` are small enough for a CPU."""
OF_TEXT: dict[str, Callable[[], nn.Module]] = {"gpt_tiny": LanguageModel}
"""Of text, by name."""
