"""Metrics. Importing this package registers every `*_metric.py` in BasicSR's METRIC_REGISTRY."""

from moeisr_basicsr.registration import import_by_suffix

import_by_suffix(__name__, __path__, '_metric')
