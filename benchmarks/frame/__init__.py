"""What all benchmarks share.

`command.py` has arguments and exit codes, `turns.py` the arithmetic of contenders that take turns, `table.py` the
tables for a terminal, and `results.py` the JSON files. `hosts.py` lays out hosts, `ranks.py` starts processes on them
and gives them orders, `rank.py` runs in each of these, `connection.py` connects them, and `sockets.py` finds the ports
that processes hold. `device.py` measures time and memory, `spans.py` reads the spans of a round, and `trainer.py` has
the Trainer and the callbacks of benchmarks.
"""
