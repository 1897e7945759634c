import math
import pickle
import sys
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples.image_classification import FolderData, ImageClassifier, ImageData
from examples.image_classification.data import DATASETS, TensorImages, random_crop_and_flip
from examples.image_classification.model import ARCHITECTURES, Architecture, build_network, learning_rate_factor
from lightning_adpsgd import AdaptivePeriod, ADPSGDStrategy, CommunicationMonitor, ConstantPeriod

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "image_classification"
CONFIGURATIONS = ("adpsgd", "cpsgd", "ddp")


# The networks


def test_every_named_architecture_can_be_built():
    assert set(get_args(Architecture)) == set(ARCHITECTURES)


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_network_gives_one_logit_per_class_and_a_gradient_to_every_parameter(architecture, channels, size):
    network = build_network(architecture, num_classes=7, in_channels=channels)

    logits = network(torch.randn(2, channels, size, size))
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()

    assert logits.shape == (2, 7)
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert all(weight.grad.any() for weight in weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_network_takes_images_of_64_pixels(architecture):
    network = build_network(architecture, num_classes=10, in_channels=3).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("resnet18", 11_173_962),  # torchvision's 11,689,512, minus the stem's and the head's difference
        ("vgg16", 14_714_688 + 8_448 + 262_656 + 5_130),  # convolutions, batch norm, hidden layer, output
        ("googlenet", 6_624_904 - 7_680 - 1_014_750),  # torchvision's, minus the stem's and the head's difference
        ("resnet20", 272_474),  # the 0.27 M of He et al., table 6, plus the two projections
        ("resnet8", 78_042),
    ],
)
def test_network_has_the_parameters_counted_by_hand(architecture, parameters):
    network = build_network(architecture, num_classes=10, in_channels=3)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"architecture": "resnet19"}, "architecture='resnet19': expected one of resnet18"),
        ({"num_classes": 1}, "num_classes=1: expected at least 2"),
        ({"in_channels": 0}, "in_channels=0: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a number above 0"),
        ({"momentum": 1.0}, "momentum=1.0: expected"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: expected"),
        ({"warmup_epochs": -1.0}, "warmup_epochs=-1.0: expected"),
        ({"decay_at": (0.75, 0.5)}, r"decay_at=\(0.75, 0.5\): expected increasing fractions"),
        ({"decay_at": (10.0, 15.0)}, r"decay_at=\(10.0, 15.0\): expected increasing fractions"),
        ({"decay_factor": 0.0}, "decay_factor=0.0: expected"),
    ],
)
def test_wrong_argument_of_the_model_is_named_with_what_is_expected(arguments, named):
    with pytest.raises(ValueError, match=named):
        ImageClassifier(**arguments)


def test_model_that_does_not_fit_the_data_says_what_to_change(tmp_path):
    write_fashion_mnist(tmp_path)
    data = ImageData("fashion_mnist", root=str(tmp_path), batch_size=2, download=False)
    with pytest.raises(ValueError, match=r"in_channels=3, but the data of ImageData has 1.*--model\.in_channels 1"):
        quiet_trainer(tmp_path, max_epochs=1).fit(ImageClassifier("resnet8"), data)


# The schedule


def test_learning_rate_warms_up_linearly_and_decays_by_steps():
    factors = [learning_rate_factor(step, 4, [10, 15], 0.1) for step in range(20)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6 + [0.1] * 5 + [0.01] * 5)


def test_decay_during_the_warm_up_multiplies_it():
    assert learning_rate_factor(1, 4, [1], 0.1) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("limits", "accumulate", "warmup_epochs", "expected"),
    [
        ({"max_epochs": 4}, 1, 1.0, [0.1, 0.2, 0.3, 0.4] + [0.4] * 4 + [0.04] * 4 + [0.004] * 4),
        ({"max_epochs": 2}, 1, 0.0, [0.4] * 4 + [0.04] * 2 + [0.004] * 2),
        ({"max_epochs": 4}, 2, 0.5, [0.4] * 4 + [0.04] * 2 + [0.004] * 2),
        ({"max_steps": 8}, 1, 0.5, [0.2, 0.4] + [0.4] * 2 + [0.04] * 2 + [0.004] * 2),
    ],
)
def test_learning_rate_of_a_run_is_the_one_computed_by_hand(tmp_path, limits, accumulate, warmup_epochs, expected):
    class Rates(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    model = ImageClassifier("resnet8", learning_rate=0.4, warmup_epochs=warmup_epochs)
    trainer = quiet_trainer(tmp_path, **limits, accumulate_grad_batches=accumulate, callbacks=[rates])
    trainer.fit(model, random_loader(images=8, batch_size=2))
    assert rates.seen == pytest.approx(expected)


def test_run_without_an_end_has_no_schedule(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"no known end.*decay_at=\(0.5, 0.75\).*set Trainer\(max_epochs"):
        trainer.fit(ImageClassifier("resnet8"), random_loader(images=4, batch_size=2))


# Training


def test_model_trains_for_an_epoch_and_logs_finite_losses(tmp_path):
    write_cifar10(tmp_path)
    data = ImageData(root=str(tmp_path), batch_size=4, verify=False, download=False)
    model = ImageClassifier("resnet8", learning_rate=0.01)
    trainer = quiet_trainer(tmp_path, max_epochs=1)

    trainer.fit(model, data)
    fitted = dict(trainer.callback_metrics)
    (tested,) = trainer.test(model, data, verbose=False)

    assert trainer.global_step == 5
    assert set(fitted) == {"train_loss_step", "train_loss_epoch", "val_acc", "val_loss"}
    assert all(math.isfinite(value) for value in fitted.values())
    assert tested == pytest.approx({"test_acc": fitted["val_acc"].item(), "test_loss": fitted["val_loss"].item()})


def test_the_loss_is_reduced_once_per_epoch_and_not_at_each_step(monkeypatch, tmp_path):
    class Counting(ADPSGDStrategy):
        reduced = 0

        def reduce(self, *arguments, **options):
            self.reduced += 1
            return super().reduce(*arguments, **options)

    def reductions(images, epochs):
        strategy = Counting(process_group_backend="gloo")
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, strategy=strategy)
        trainer.fit(ImageClassifier("resnet8"), random_loader(images, batch_size=2))
        return strategy.reduced

    monkeypatch.setenv("LOCAL_RANK", "0")  # Lightning takes the process group below instead of making its own
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        base, more_steps, more_epochs = reductions(4, 2), reductions(12, 2), reductions(4, 3)
    finally:
        torch.distributed.destroy_process_group()
    assert more_steps == base
    assert more_epochs == base + 2  # the loss, and the number of images behind it


# The configurations


def read(name):
    return yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["cpsgd", "ddp"])
def test_configurations_differ_in_strategy_and_logger_name_only(name):
    reference, other = read("adpsgd"), read(name)
    assert other["trainer"]["logger"]["init_args"]["name"] == name
    for configuration in (reference, other):
        del configuration["trainer"]["strategy"]
        del configuration["trainer"]["logger"]["init_args"]["name"]
    assert reference == other


def command_line(monkeypatch, tmp_path, name, *arguments):
    monkeypatch.setattr(sys, "argv", ["test"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    configuration = str(EXAMPLE / f"{name}.yaml")
    return LightningCLI(run=False, args=["--config", configuration, "--trainer.accelerator", "cpu", *arguments])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_makes_the_trainer_model_and_data_it_names(monkeypatch, tmp_path, name):
    cli = command_line(monkeypatch, tmp_path, name)
    assert isinstance(cli.model, ImageClassifier)
    assert isinstance(cli.datamodule, ImageData)
    assert tuple(cli.model.hparams.decay_at) == (0.5, 0.75)
    assert cli.trainer.world_size == 2
    assert {CommunicationMonitor, LearningRateMonitor} <= {type(callback) for callback in cli.trainer.callbacks}
    assert isinstance(cli.trainer.logger, CSVLogger)
    assert isinstance(cli.trainer.strategy, DDPStrategy)
    assert isinstance(cli.trainer.strategy, ADPSGDStrategy) == (name != "ddp")


def test_configured_periods_are_adaptive_from_4_and_constant_8(monkeypatch, tmp_path):
    strategies = {name: read(name)["trainer"]["strategy"] for name in CONFIGURATIONS}
    period = strategies["adpsgd"]["init_args"]["period"]
    assert period["class_path"].rsplit(".", 1)[1] == AdaptivePeriod.__name__
    assert AdaptivePeriod(**period["init_args"]).value == 4
    assert ConstantPeriod(strategies["cpsgd"]["init_args"]["period"]).value == 8
    assert strategies["ddp"] == "ddp"


def test_command_line_overrides_a_configuration(monkeypatch, tmp_path):
    overrides = "--trainer.devices 4 --trainer.max_epochs 10 --model.architecture resnet8 --data.train_images 10000"
    cli = command_line(monkeypatch, tmp_path, "adpsgd", *overrides.split())
    assert cli.trainer.world_size == 4
    assert cli.trainer.max_epochs == 10
    assert cli.model.hparams.architecture == "resnet8"
    assert cli.datamodule.train_images == 10_000
    assert cli.datamodule.batch_size == 64


@pytest.mark.filterwarnings("ignore:.*class_path.*")
def test_command_line_exchanges_the_data_set_for_a_folder(monkeypatch, tmp_path):
    exchange = "--data examples.image_classification.FolderData --data.root pictures --model.num_classes 3"
    cli = command_line(monkeypatch, tmp_path, "adpsgd", *exchange.split())
    assert isinstance(cli.datamodule, FolderData)
    assert cli.datamodule.root == "pictures"


# The data in memory


def test_cifar10_is_read_as_the_pixels_and_labels_on_disk(tmp_path):
    images, labels = write_cifar10(tmp_path)
    data = ImageData(root=str(tmp_path), batch_size=4, augment=False, verify=False, download=False)
    data.prepare_data()
    data.setup("fit")

    assert (data.num_classes, data.in_channels) == (10, 3)
    assert torch.equal(data.train_set.images, images)
    assert data.train_set.labels.tolist() == labels
    assert len(data.val_set) == 4
    image, label = data.train_set[7]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (DATASETS["cifar10"].mean, DATASETS["cifar10"].std))
    torch.testing.assert_close(image, (images[7] / 255 - mean) / std)
    assert label == labels[7]


def test_cifar100_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        write_pickle(folder / name, {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [99, 0, 1, 2]})
    data = ImageData("cifar100", root=str(tmp_path), batch_size=2, verify=False, download=False)
    data.setup("fit")
    assert data.num_classes == 100
    assert data.train_set.labels.tolist() == [99, 0, 1, 2]


def test_fashion_mnist_has_one_channel(tmp_path):
    images = write_fashion_mnist(tmp_path)
    data = ImageData("fashion_mnist", root=str(tmp_path), batch_size=2, download=False)
    data.setup("fit")
    assert (data.num_classes, data.in_channels) == (10, 1)
    assert torch.equal(data.train_set.images, images.unsqueeze(1))
    batch, labels = next(iter(data.train_dataloader()))
    assert batch.shape == (2, 1, 28, 28)
    assert batch.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_repacked_batches_are_refused_unless_verify_is_false(tmp_path):
    write_cifar10(tmp_path)
    data = ImageData(root=str(tmp_path), download=False)
    with pytest.raises(RuntimeError, match=r"not the published ones.*verify=False"):
        data.setup("fit")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("dataset", DATASETS)
def test_missing_data_says_where_it_was_sought_and_how_to_get_it(tmp_path, dataset, verify):
    data = ImageData(dataset, root=str(tmp_path / "nowhere"), download=False, verify=verify)
    with pytest.raises(RuntimeError, match=rf"{dataset} is missing under root=.*nowhere.*download=True"):
        data.setup("fit")


def test_train_images_takes_that_many_of_the_first_images(tmp_path):
    images, _ = write_cifar10(tmp_path)
    data = ImageData(root=str(tmp_path), batch_size=2, train_images=6, verify=False, download=False)
    data.setup("fit")
    assert torch.equal(data.train_set.images, images[:6])
    assert len(data.val_set) == 4


def test_missing_training_batches_are_tolerated_only_if_a_part_was_asked_for(tmp_path):
    write_cifar10(tmp_path, batches=2)
    options = {"root": str(tmp_path), "batch_size": 2, "verify": False, "download": False}
    with pytest.raises(RuntimeError, match=r"lacks data_batch_3, data_batch_4, data_batch_5: .*train_images"):
        ImageData(**options).setup("fit")
    with pytest.raises(ValueError, match="train_images=9, but there are 8"):
        ImageData(**options, train_images=9).setup("fit")
    data = ImageData(**options, train_images=8)
    data.setup("fit")
    assert len(data.train_set) == 8


@pytest.mark.parametrize(("download", "verify", "times"), [(True, True, 1), (False, True, 0), (True, False, 0)])
def test_data_is_downloaded_in_prepare_data_alone_and_only_if_allowed(monkeypatch, download, verify, times):
    calls = []
    facts = DATASETS["cifar10"]._replace(original=lambda root, **options: calls.append((root, options)))
    monkeypatch.setitem(DATASETS, "cifar10", facts)
    ImageData(root="there", download=download, verify=verify).prepare_data()
    assert calls == [("there", {"download": True})] * times


def test_training_batches_are_all_full_and_validation_sees_every_image(tmp_path):
    write_cifar10(tmp_path)
    data = ImageData(root=str(tmp_path), batch_size=3, verify=False, download=False)
    data.setup("fit")
    assert [len(labels) for _, labels in data.train_dataloader()] == [3] * 6
    assert [len(labels) for _, labels in data.val_dataloader()] == [3, 1]
    assert [len(labels) for _, labels in data.test_dataloader()] == [3, 1]


def test_share_smaller_than_a_batch_is_an_error(tmp_path):
    write_cifar10(tmp_path)
    data = ImageData(root=str(tmp_path), batch_size=21, verify=False, download=False)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"batch_size=21.*share 20 training images.*set batch_size to 20 or less"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dataset": "svhn"}, "dataset='svhn': expected one of cifar10, cifar100, fashion_mnist"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1: expected 0"),
        ({"train_images": 0}, "train_images=0: expected at least 1"),
    ],
)
def test_wrong_argument_of_the_data_is_named_with_what_is_expected(arguments, named):
    with pytest.raises(ValueError, match=named):
        ImageData(**arguments)


def test_augmented_image_is_a_window_of_the_padded_image_or_its_mirror_image():
    images = torch.randint(1, 256, (200, 3, 6, 5), dtype=torch.uint8)
    drawn = random_crop_and_flip(images, padding=2)
    padded = F.pad(images, (2, 2, 2, 2))
    places = set()
    for index, image in enumerate(drawn):
        windows = {
            (top, left, mirrored): window.flip(-1) if mirrored else window
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for window in [padded[index, :, top : top + 6, left : left + 5]]
        }
        found = [place for place, window in windows.items() if torch.equal(window, image)]
        assert len(found) == 1
        places.update(found)
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(5))
    assert {mirrored for _, _, mirrored in places} == {False, True}


def test_images_on_disk_and_in_memory_are_not_changed_by_reading_them():
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    before = images.clone()
    dataset = TensorImages(images, torch.arange(8), (0.5,) * 3, (0.5,) * 3, augment=True)
    dataset.__getitems__([0, 3, 7])
    assert torch.equal(images, before)


# The data in folders


def test_folder_of_pictures_becomes_batches_of_one_size(tmp_path):
    write_pictures(tmp_path, train=("ant", "bee", "cat"), val=("ant", "bee", "cat"))
    data = FolderData(str(tmp_path), image_size=32, batch_size=2, num_workers=0)
    data.setup("fit")

    assert (data.num_classes, data.in_channels) == (3, 3)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (2, 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_model_trains_on_a_folder_of_pictures(tmp_path):
    write_pictures(tmp_path, train=("ant", "bee"), val=("ant", "bee"))
    data = FolderData(str(tmp_path), image_size=28, batch_size=2, num_workers=0, augment=False)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(ImageClassifier("resnet8", num_classes=2, learning_rate=0.01), data)
    assert math.isfinite(trainer.callback_metrics["val_loss"])


def test_missing_folder_says_what_is_expected_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*one subfolder with images per class.*train='train'"):
        FolderData(str(tmp_path)).setup("fit")


def test_folders_with_different_classes_are_refused(tmp_path):
    write_pictures(tmp_path, train=("ant", "bee"), val=("ant", "cat"))
    with pytest.raises(ValueError, match=r"must have the same classes.*: bee, cat"):
        FolderData(str(tmp_path)).setup("fit")


# Helpers


def quiet_trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def random_loader(images, batch_size):
    pixels = torch.randint(256, (images, 3, 8, 8), dtype=torch.uint8)
    dataset = TensorImages(pixels, torch.arange(images) % 10, (0.5,) * 3, (0.25,) * 3)
    return DataLoader(dataset, batch_size, collate_fn=lambda batch: batch)


def write_pickle(path, content):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=2)


def write_cifar10(root, batches=5):
    """Training batches of four images each and a test batch, as CIFAR-10 has them; no checksum matches."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    images, labels = [], []
    for name in [*(f"data_batch_{number + 1}" for number in range(batches)), "test_batch"]:
        pixels = generator.integers(256, size=(4, 3072), dtype=np.uint8)
        batch_labels = generator.integers(10, size=4).tolist()
        write_pickle(folder / name, {"data": pixels, "labels": batch_labels})
        if name != "test_batch":
            images.append(torch.from_numpy(pixels).view(4, 3, 32, 32))
            labels += batch_labels
    return torch.cat(images), labels


def write_fashion_mnist(root):
    """Six training and two test images in the IDX format."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, number in (("t10k", 2), ("train", 6)):
        pixels = generator.integers(256, size=(number, 28, 28), dtype=np.uint8)
        header = b"".join(value.to_bytes(4, "big") for value in (0x0803, number, 28, 28))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = b"".join(value.to_bytes(4, "big") for value in (0x0801, number))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(range(number)))
    return torch.from_numpy(pixels)


def write_pictures(root, **classes):
    """Two small PNGs of different sizes per class."""
    generator = np.random.default_rng(0)
    for split, names in classes.items():
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number, size in enumerate([(40, 50), (64, 48)]):
                pixels = generator.integers(256, size=(*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
