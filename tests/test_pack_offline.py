"""The script that packs what a machine without a network lacks."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "pack_offline.py"


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Its main function, for which pip installs one small package; in an empty folder."""
    specification = importlib.util.spec_from_file_location("pack_offline", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def install(command, check):
        assert check
        site = Path(command[command.index("--target") + 1])
        for unused in (site / "package" / "__pycache__", site / "matplotlib" / "tests", site / "fontTools" / "misc"):
            unused.mkdir(parents=True)
            (unused / "module.so").write_bytes(bytes(2**20))
        (site / "package" / "module.py").write_bytes(bytes(2**20))

    monkeypatch.setattr(subprocess, "run", install)
    monkeypatch.chdir(tmp_path)
    return module.main


def test_packages_and_data_are_packed_without_what_is_not_used(pack, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "batch").write_bytes(bytes(2**20))
    assert pack(["--data", "images"]) == 0
    files = {str(file.relative_to(tmp_path / "offline")) for file in (tmp_path / "offline").rglob("*.*")}
    assert files == {"site/package/module.py"}
    assert (tmp_path / "offline" / "data" / "batch").exists()
    assert "offline: 2.0 MiB" in capsys.readouterr().out


def test_a_folder_larger_than_the_limit_is_reported(pack, capsys):
    assert pack(["--limit-mib", "0"]) == 1
    assert "more than --limit-mib 0: leave out some of --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--folder", "."], "--folder .: it exists already. Delete it"),
        (["--data", "nowhere"], "--data nowhere: expected a folder that exists"),
    ],
)
def test_wrong_folders_are_refused_and_nothing_is_deleted(pack, tmp_path, capsys, arguments, told):
    (tmp_path / "kept").touch()
    with pytest.raises(SystemExit, match="2"):
        pack(arguments)
    assert told in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [tmp_path / "kept"]


def test_an_installation_that_fails_ends_with_what_was_asked_for(pack, capsys, monkeypatch):
    def fail(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert pack(["--python", "3.99"]) == 2
    assert "for Python 3.99" in capsys.readouterr().err
