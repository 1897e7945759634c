"""How well elastic training survives faults.

`task.py` is what is trained, `contenders.py` has the two that train it, `process.py` is what a process does,
`faults.py` draws the faults, `run.py` does one run and `log.py` is what it has noted, `report.py` does the arithmetic
and prints, and `__main__.py` is the command.
"""
