"""Retrieval: two towers and their losses, item indexes, ranking what was retrieved, and honest evaluation."""
