"""What connects the package to Lightning's Trainer; apart from ``cli.py``, nothing else imports Lightning."""
