"""Runnable examples, smallest first: `digits.py`, `plain_loop.py`, `image_classification/`."""
