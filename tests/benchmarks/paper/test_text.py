import io
import re
import urllib.request

import pytest
import torch

from benchmarks.paper import text
from benchmarks.paper.text import CONTEXT, NAME, TextData, TextMissingError, Windows, find_text

CHARACTERS = torch.arange(1000)


def test_each_character_is_followed_by_the_next_one():
    inputs, targets = Windows(CHARACTERS).__getitems__([0, 3])
    assert inputs.shape == targets.shape == (2, CONTEXT)
    assert torch.equal(targets, inputs + 1)
    assert inputs[1, 0] == 3 * CONTEXT
    first, _ = Windows(CHARACTERS)[3]
    assert torch.equal(first, inputs[1])


@pytest.mark.parametrize("length", [CONTEXT + 1, 2 * CONTEXT, 2 * CONTEXT + 1, 1000])
def test_windows_without_a_count_do_not_overlap_and_miss_less_than_one(length):
    windows = Windows(CHARACTERS[:length])
    inputs, targets = windows.__getitems__(range(len(windows)))
    assert len(inputs.unique()) == inputs.numel()
    assert length - 1 - CONTEXT < inputs.numel() <= length - 1
    assert targets.max() < length


def test_windows_begin_at_random_within_the_text_if_asked_to():
    windows = Windows(CHARACTERS, count=10, augment=True)
    draws = [windows.__getitems__(range(10)) for _ in range(50)]
    starts = torch.stack([inputs[:, 0] for inputs, _ in draws])
    assert len(starts[:, 3].unique()) > 10
    distance = (1000 - CONTEXT) // 10
    assert all(torch.equal(row // distance, torch.arange(10)) for row in starts)
    assert max(int(targets.max()) for _, targets in draws) < 1000
    windows.augment = False
    assert torch.equal(windows.__getitems__([4])[0], windows.__getitems__([4])[0])


def test_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="expected more than 64 characters of text, got 64"):
        Windows(CHARACTERS[:CONTEXT])


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A made-up text in place of the published one."""
    content = ("To be, or not to be: that is the question. " * 50).encode()
    monkeypatch.setattr(text, "SHA256", text.hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content))
    return tmp_path / "data", content


def test_text_is_downloaded_once_and_its_end_is_kept_for_validation(published, monkeypatch):
    folder, content = published
    find_text(folder)
    assert (folder / NAME).read_bytes() == content
    assert [file.name for file in folder.iterdir()] == [NAME]
    monkeypatch.setattr(urllib.request, "urlopen", None)
    find_text(folder)
    data = TextData(folder, windows=7)
    assert len(data.train_set) == 7
    trained, validated = data.train_set.characters, data.val_set.characters
    assert len(trained) == int(0.9 * len(content))
    assert "".join(data.alphabet[each] for each in torch.cat([trained, validated])) == content.decode()


def test_text_that_is_not_the_published_one_is_refused(published):
    folder, _ = published
    folder.mkdir()
    (folder / NAME).write_text("To be, or not.")
    for read in (find_text, TextData):
        with pytest.raises(TextMissingError, match=re.escape(f"{NAME} is not the published file: expected SHA-256")):
            read(folder)


def test_text_that_cannot_be_downloaded_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def no_network(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(TextMissingError, match=r"could not be downloaded \(no route\).*--data"):
        find_text(tmp_path)
    with pytest.raises(TextMissingError, match="does not exist; expected the text of https"):
        TextData(tmp_path)
    assert list(tmp_path.iterdir()) == []
