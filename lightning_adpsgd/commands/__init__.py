"""The commands of ``adpsgd`` besides those of LightningCLI: one module each, with a ``main`` that takes arguments."""
