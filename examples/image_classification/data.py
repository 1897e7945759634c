"""Small images for classification: CIFAR-10, CIFAR-100 and Fashion-MNIST from memory, any ImageFolder from disk."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import v2

DatasetName = Literal["cifar10", "cifar100", "fashion_mnist"]


class _Repacked:
    """Mixed into torchvision's CIFAR: takes the batches that exist, whatever their checksums."""

    def _check_integrity(self) -> bool:
        folder = Path(self.root, self.base_folder)
        self.train_list = [entry for entry in self.train_list if (folder / entry[0]).is_file()]
        return bool(self.train_list) and (folder / self.test_list[0][0]).is_file()

    def _load_meta(self) -> None:
        """The names of the classes are not needed, and their file may be missing."""


class _RepackedCIFAR10(_Repacked, CIFAR10):
    pass


class _RepackedCIFAR100(_Repacked, CIFAR100):
    pass


class _Facts(NamedTuple):
    original: type
    repacked: type
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Mean and standard deviation are those of all training pixels per channel, scaled to [0, 1]. They were computed from
# the data for CIFAR-10 and Fashion-MNIST; for CIFAR-100 they are the values in general use.
DATASETS: dict[str, _Facts] = {
    "cifar10": _Facts(CIFAR10, _RepackedCIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Facts(CIFAR100, _RepackedCIFAR100, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    # torchvision compares no checksums of unpacked Fashion-MNIST files, so there is nothing to skip.
    "fashion_mnist": _Facts(FashionMNIST, FashionMNIST, 10, (0.2860,), (0.3530,)),
}
# Of ImageNet, as torchvision's own recipes use them: good enough for any photographs.
PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _ImageDataModule(pl.LightningDataModule):
    """The loaders: the subclasses fill ``train_set`` and ``val_set`` in `setup`."""

    collate = None  # the DataLoader's own

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1, the images per worker and step")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: expected 0 (load in the training process) or more")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None

    def train_dataloader(self) -> DataLoader:
        workers = self.trainer.world_size if self.trainer else 1
        share = math.ceil(len(self.train_set) / workers)
        if share < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}, but {workers} worker(s) share {len(self.train_set)} training images, "
                f"{share} each, less than one batch: set batch_size to {share} or less, or take more images"
            )
        return self._loader(self.train_set, training=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_set, training=False)

    def test_dataloader(self) -> DataLoader:
        """The same images as in validation: nothing is selected on them."""
        return self.val_dataloader()

    def _loader(self, dataset: Dataset, training: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=training,
            drop_last=training,  # every worker takes the same number of equally large batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
        )


class ImageData(_ImageDataModule):
    """CIFAR-10, CIFAR-100 or Fashion-MNIST, held in memory as uint8. The test set serves validation and test.

    Args:
        dataset: which of them.
        root: folder that holds the data, or that it is downloaded to.
        batch_size: images per step **and worker**: n workers see n · batch_size images in a step.
        num_workers: processes per worker that prepare batches; 0 is fine, as it takes little of a training step.
        augment: cut training images at random after padding 4 pixels, and mirror half of them.
        train_images: use only this many training images, the first ones; None takes all.
        download: fetch what is missing, once per node.
        verify: compare the files with torchvision's checksums. False reads CIFAR batches that hold the same images but
            were repacked; then nothing is downloaded, and training batches may be missing if ``train_images`` is given.

    Raises:
        ValueError: if an argument is out of its range.
        RuntimeError: in `setup`, if the data is missing or not as published.
    """

    def __init__(
        self,
        dataset: DatasetName = "cifar10",
        root: str = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        augment: bool = True,
        train_images: int | None = None,
        download: bool = True,
        verify: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if dataset not in DATASETS:
            raise ValueError(
                f"dataset={dataset!r}: expected one of {', '.join(get_args(DatasetName))}; "
                "images in folders of your own are read by FolderData"
            )
        if train_images is not None and train_images < 1:
            raise ValueError(f"train_images={train_images}: expected at least 1, or None for all training images")
        self.dataset = dataset
        self.root = root
        self.augment = augment
        self.train_images = train_images
        self.download = download
        self.verify = verify
        self.collate = _as_is  # `TensorImages` makes whole batches

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return DATASETS[self.dataset].num_classes

    @property
    def in_channels(self) -> int:
        """3 for colour, 1 for grey."""
        return len(DATASETS[self.dataset].mean)

    def prepare_data(self) -> None:
        """Download; Lightning calls this once per node."""
        if self.download and self.verify:
            DATASETS[self.dataset].original(self.root, download=True)

    def setup(self, stage: str) -> None:
        """Read the images that the stage needs into memory; Lightning calls this on every worker."""
        facts = DATASETS[self.dataset]
        if self.val_set is None:
            self.val_set = TensorImages(*self._read(train=False), facts.mean, facts.std)
        if stage == "fit" and self.train_set is None:
            images, labels = self._read(train=True)
            if len(images) < (self.train_images or 0):
                raise ValueError(
                    f"train_images={self.train_images}, but there are {len(images)} training images of {self.dataset} "
                    f"under {self.root!r}: lower train_images"
                )
            kept = slice(self.train_images)
            self.train_set = TensorImages(images[kept], labels[kept], facts.mean, facts.std, self.augment)

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """All images as uint8 (N, C, H, W), and their labels as int64 (N)."""
        facts = DATASETS[self.dataset]
        try:
            source = (facts.original if self.verify else facts.repacked)(self.root, train=train, download=False)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.dataset} is missing under root={self.root!r}, or its files are not the published ones.  "
                "Set root to the folder that holds it, or download=True to fetch it"
                + ("; verify=False reads CIFAR batches that were repacked" if self.verify else " with verify=True")
            ) from error
        self._check_complete(source, train)
        images = torch.as_tensor(source.data)
        images = images.unsqueeze(1) if self.in_channels == 1 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(source.targets)

    def _check_complete(self, source: Dataset, train: bool) -> None:
        """Part of the training set is read only if ``train_images`` asks for a part."""
        if train and isinstance(source, _Repacked) and self.train_images is None:
            missing = [name for name, _ in type(source).train_list if name not in dict(source.train_list)]
            if missing:
                raise RuntimeError(
                    f"{self.dataset} under root={self.root!r} lacks {', '.join(missing)}: add what is missing, or set "
                    "train_images to the number of existing images to use"
                )


class FolderData(_ImageDataModule):
    """Colour images in one folder per class, ``root/train/<class>/*`` and ``root/val/<class>/*``.

    Args:
        root: folder that holds both.
        image_size: height and width that images are resized to, in pixels.
        batch_size: images per step **and worker**: n workers see n · batch_size images in a step.
        num_workers: processes per worker that decode images.
        augment: cut training images at random to 35 to 100 % of their area, and mirror half of them.
        train: subfolder with the training images.
        val: subfolder with the images of validation and test.

    Raises:
        ValueError: if an argument is out of its range, or both subfolders do not have the same classes.
        FileNotFoundError: if a subfolder does not exist, or has no classes.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 64,
        batch_size: int = 128,
        num_workers: int = 2,
        augment: bool = True,
        train: str = "train",
        val: str = "val",
    ) -> None:
        super().__init__(batch_size, num_workers)
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: expected at least 1, in pixels")
        self.root = root
        self.image_size = image_size
        self.augment = augment
        self.train = train
        self.val = val

    @property
    def num_classes(self) -> int:
        """Number of classes, one for each folder in ``root/train``."""
        return len(self._classes("train"))

    @property
    def in_channels(self) -> int:
        """Always 3: grey images are read as colour."""
        return 3

    def setup(self, stage: str) -> None:
        """List the images of both folders; Lightning calls this on every worker."""
        train_classes, val_classes = self._classes("train"), self._classes("val")
        if train_classes != val_classes:
            differing = ", ".join(sorted(set(train_classes) ^ set(val_classes)))
            raise ValueError(
                f"train={self.train!r} and val={self.val!r} under root={self.root!r} must have the same classes, but "
                f"only one of them has: {differing}"
            )
        size = self.image_size
        if self.augment:
            cut = [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        else:
            cut = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
        centre = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
        self.train_set = ImageFolder(Path(self.root, self.train), _photo_transform(cut))
        self.val_set = ImageFolder(Path(self.root, self.val), _photo_transform(centre))

    def _classes(self, argument: Literal["train", "val"]) -> list[str]:
        """The names of the classes in one of the subfolders."""
        folder = Path(self.root, getattr(self, argument))
        try:
            return find_classes(str(folder))[0]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} does not exist or has no subfolders: expected one subfolder with images per class. "
                f"Set root={self.root!r} or {argument}={getattr(self, argument)!r} to where they are"
            ) from error


class TensorImages(Dataset):
    """Images in memory. Whole batches are cut, mirrored and normalised at once: no decoding, no loop over images.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N).
        mean: per channel, for pixels in [0, 1].
        std: per channel, for pixels in [0, 1].
        augment: cut at random after padding 4 pixels, and mirror half of the images.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], augment: bool = False
    ) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std, inplace=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch; the DataLoader calls this rather than fetching images one by one."""
        images = self.images[indices]
        if self.augment:
            images = random_crop_and_flip(images)
        return self.normalise(images), self.labels[indices]


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Pad each image of a batch (N, C, H, W) with black, cut it to its size at random and mirror it with probability ½.

    This is torchvision's ``RandomCrop(padding=4)`` and ``RandomHorizontalFlip()``, but drawn anew for each image of a
    batch.
    """
    number, _, height, width = images.shape
    # A view of every possible window: (N, C, top, left, H, W)
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, number))
    cut = windows[torch.arange(number), :, top, left]
    return torch.where(torch.rand(number, 1, 1, 1) < 0.5, cut.flip(3), cut)


def _photo_transform(cut: list[v2.Transform]) -> v2.Transform:
    """From a decoded photograph to a normalised float tensor (3, H, W)."""
    return v2.Compose([v2.ToImage(), *cut, v2.ToDtype(torch.float32, scale=True), v2.Normalize(PHOTO_MEAN, PHOTO_STD)])


def _as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
