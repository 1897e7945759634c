"""What is averaged, laid out as one index space, and a bucket's way to its mean and back."""
