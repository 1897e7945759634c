"""``python -m lightning_adpsgd``."""

from lightning_adpsgd.cli import main

if __name__ == "__main__":
    main()
