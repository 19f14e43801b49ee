"""Metrics for click models and retrieval; start reading at `rec_metric`."""
