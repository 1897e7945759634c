"""Text for a language model: tiny shakespeare, one character after the other."""

import hashlib
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.frame.command import say
from benchmarks.frame.errors import NotMeasuredError

NAME = "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CONTEXT = 64  # characters that a prediction sees at most
VALIDATED = 0.1  # the share at the end of the text that nothing is trained on


class TextMissingError(NotMeasuredError):
    """There is no text to train on."""


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of a text, and for each of their characters the one that follows.

    Args:
        characters: the text as int64 of shape (characters,).
        count: the number of sequences; they begin at equal distances. None takes as many as fit without overlap.
        augment: begin each sequence at a random place before the next one, drawn anew each time.

    Raises:
        ValueError: if the text is shorter than a sequence.
    """

    def __init__(self, characters: Tensor, count: int | None = None, augment: bool = False) -> None:
        starts = len(characters) - CONTEXT  # where a sequence can begin
        if starts < 1:
            raise ValueError(f"Windows(): expected more than {CONTEXT} characters of text, got {len(characters)}.")
        self.characters = characters
        self.count = count or (starts - 1) // CONTEXT + 1
        self.augment = augment
        self._distance = max(1, starts // self.count) if count else CONTEXT

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: int64 of shape (batch, CONTEXT), twice."""
        starts = torch.as_tensor(indices) * self._distance
        if self.augment:
            starts = starts + torch.randint(self._distance, starts.shape)
        places = starts.unsqueeze(1) + torch.arange(CONTEXT)
        return self.characters[places], self.characters[places + 1]


class TextData:
    """Tiny shakespeare: the first nine tenths are for training, the rest is for validation.

    Args:
        root: folder with the file.
        windows: training sequences of an epoch.

    Raises:
        TextMissingError: if the file is missing, or is not the published one.
    """

    def __init__(self, root: str | Path, windows: int | None = None) -> None:
        text = read(Path(root))
        alphabet = sorted(set(text))
        numbers = {character: number for number, character in enumerate(alphabet)}
        characters = torch.tensor([numbers[character] for character in text])
        trained = int(len(text) * (1 - VALIDATED))
        self.alphabet = alphabet
        self.train_set = Windows(characters[:trained], windows, augment=True)
        self.val_set = Windows(characters[trained:])


def read(folder: Path) -> str:
    """The text, which has to be there as it was published."""
    file = folder / NAME
    if not file.is_file():
        raise TextMissingError(
            f"{file} does not exist; expected the text of {URL}. Download it there, or name its folder."
        )
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise TextMissingError(
            f"{file} is not the published file: expected SHA-256 {SHA256}. Delete it, and download {URL}."
        )
    return content.decode()


def find_text(folder: Path) -> None:
    """Download the text unless it is there.

    Raises:
        TextMissingError: if it cannot be downloaded.
    """
    file = folder / NAME
    if not file.is_file():
        say(f"{NAME} is not in {folder}: downloading it.")
        try:
            with urllib.request.urlopen(URL, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise TextMissingError(
                f"{NAME} is not in {folder} and could not be downloaded ({error}). Put the text of {URL} there under"
                " this name, or name the folder that holds it with --data."
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(file)
    read(folder)
