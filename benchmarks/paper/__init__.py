"""The comparison of the paper (arXiv:2007.06134, section 4), from training to the page of results.

`plan.py` says what is trained and by whom, `networks.py` has the networks, `text.py` the text for one of them,
`training.py` is what a rank does, `runs.py` keeps what was done, `results.py` does the arithmetic, `claims.py` judges
the paper's claims and `against_bytes.py` this project's goals, `figures.py` draws, `page.py` writes, and `__main__.py`
is the command.
"""
