"""Process groups: collectives, the bytes they send, and what peers can say when a collective cannot be relied on."""
