"""Check the wheel and the sdist in a folder: what they hold, what PyPI will show, and that the wheel works."""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_adpsgd"
IN_SDIST = ("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Makefile", "tests/conftest.py", "docs/index.md")

USE = f"""
import sys
from importlib.metadata import version

folder, built = sys.argv[1:]
sys.path.insert(0, folder)

import torch
from {PACKAGE} import AdaptivePeriod, LocalSGD, __file__, __version__

assert __file__.startswith(folder), __file__
assert __version__ == version("lightning-adpsgd") == built, (__version__, built)
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
local_sgd = LocalSGD(optimizer, AdaptivePeriod(), total_steps=4)
for _ in range(4):
    local_sgd.step()
"""


def main(folder: Path) -> None:
    """Check what ``python -m build`` has put into a folder."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    metadata = check_files_of_wheel(wheel)
    check_page(metadata.get_payload())
    check_files_of_sdist(sdist)
    use(wheel, metadata["Version"])
    print(f"{wheel.name} and {sdist.name} hold what they should; the wheel works in an empty folder")


def check_files_of_wheel(wheel: Path) -> Message:
    """A wheel holds all files of the package and no others; returns its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        content = archive.read(metadata)
    held = {name for name in names if not name.startswith(metadata.partition("/")[0])}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    expect_same(wheel.name, held, files)
    assert f"{PACKAGE}/py.typed" in held
    return message_from_bytes(content)


def check_page(text: str) -> None:
    """PyPI knows no files of the repository: every link of its page is absolute, or leads to a part of the page."""
    targets = re.findall(r"\]\(([^)\s]+)|(?:src|srcset|href)=\"([^\"]+)", text)
    relative = [link or attribute for link, attribute in targets if not re.match(r"\w+:|#", link or attribute)]
    if relative:
        sys.exit(f"The page on PyPI would have links to files that are not there: {', '.join(relative)}")


def check_files_of_sdist(sdist: Path) -> None:
    """An sdist holds all that git tracks (where git is there to ask), and what a reader looks for."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    assert held.issuperset(IN_SDIST), set(IN_SDIST) - held
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
        expect_same(sdist.name, held, {file for file in tracked.stdout.splitlines() if (ROOT / file).exists()})


def expect_same(archive: str, held: set[str], files: set[str]) -> None:
    """Two sets of files are the same, or the script ends with the difference."""
    if held != files:
        sys.exit(f"{archive} lacks {sorted(files - held)} and has {sorted(held - files)} too many")


def use(wheel: Path, version: str) -> None:
    """Install a wheel without its dependencies into an empty folder, and average with it."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, str(wheel)]
        subprocess.run([*install, "--disable-pip-version-check"], check=True)
        subprocess.run([sys.executable, "-I", "-c", USE, folder, version], cwd=folder, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
