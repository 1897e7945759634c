"""Runnable examples, smallest first: `digits.py`, `plain_loop.py`, `demo.py`, `image_classification/`."""
