"""Metrics. The package registers every `*_metric.py` in BasicSR's METRIC_REGISTRY."""
