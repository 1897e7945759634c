"""One round of averaging: when fragments travel, where every rank stands, what was measured, and its record."""
