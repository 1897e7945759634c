"""Packs what a machine without a network lacks into one folder, which git ignores, to be copied there with the project.

    python .ci/pack_offline.py [--python 3.12] [--data DIR] [--limit-mib 64] [--folder offline]

There, PyTorch, torchvision and torchmetrics have to be installed. The folder holds `site/`, with the other packages
that `make test-gpu`, `make bench-gpu` and `benchmarks.paper` import, and with --data a copy of that folder (of
CIFAR-10, for example) as `data/`. CONTRIBUTING says how to use it.

The exit code is 0; 1 if the folder is larger than the limit; 2 if something could not be packed.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "lightning", "lightning-utilities", "jsonargparse", "docstring-parser", "typeshed-client", "importlib-resources",
    "pytest", "pluggy", "iniconfig", "pygments",
    "matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "python-dateutil", "six",
)  # fmt: skip
"""Each without what it depends on, which would be PyTorch once more."""


def pack_packages(target: Path, python: str) -> None:
    """Install the packages into a folder, for another version of Python than this one's if need be."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    for_others = ["--only-binary", ":all:", "--python-version", python, "--upgrade", "--target", str(target)]
    subprocess.run([*command, *for_others, *PACKAGES], check=True)
    for unused in [*target.rglob("__pycache__"), target / "matplotlib" / "tests"]:
        shutil.rmtree(unused)
    for compiled in (target / "fontTools").rglob("*.so"):  # each is also there in Python
        compiled.unlink()


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Pack, and say how large it is and what to do with it."""
    parser = argparse.ArgumentParser(description="Pack what a machine without a network lacks.")
    parser.add_argument("--python", default="3.12", help="its version of Python (3.12)")
    parser.add_argument("--data", type=Path, help="a folder with data to take along")
    parser.add_argument("--limit-mib", type=int, default=64, help="how large the folder may be (64)")
    parser.add_argument("--folder", type=Path, default=Path("offline"), help="where to pack (offline)")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: expected a folder that exists.")
    folder: Path = options.folder
    if folder.exists():
        parser.error(f"--folder {folder}: it exists already. Delete it, or name another one.")
    try:
        pack_packages(folder / "site", options.python)
    except subprocess.CalledProcessError:
        print(f"pip could not install all of {', '.join(PACKAGES)} for Python {options.python}.", file=sys.stderr)
        return 2
    if options.data is not None:
        shutil.copytree(options.data, folder / "data", symlinks=False)
    size = size_of(folder) / 2**20
    print(f"{folder}: {size:.1f} MiB. Copy it with the project, and there: make test-gpu bench-gpu OFFLINE={folder}")
    if size > options.limit_mib:
        print(f"That is more than --limit-mib {options.limit_mib}: leave out some of --data.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
