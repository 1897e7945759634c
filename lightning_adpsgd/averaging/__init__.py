"""Averages tensors and optimizer state over the workers: layout, buckets, codecs, and what is done with the mean."""
