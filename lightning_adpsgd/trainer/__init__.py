"""The door to Lightning; the only package here that imports it."""
