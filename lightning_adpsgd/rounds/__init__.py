"""Averaging rounds: the schedule of their fragments, the handshake of the ranks, the measures, and the record."""
