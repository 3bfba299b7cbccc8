"""Losses. Importing this package registers every `*_loss.py` in BasicSR's LOSS_REGISTRY."""

from moeisr_basicsr.registration import import_by_suffix

import_by_suffix(__name__, __path__, '_loss')
