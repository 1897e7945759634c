"""``python -m lightning_adpsgd.pytorch_lightning``."""

import importlib

if __name__ == "__main__":
    importlib.import_module("lightning_adpsgd.pytorch_lightning.cli").main()
