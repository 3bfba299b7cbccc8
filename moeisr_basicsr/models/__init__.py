"""Models. Importing this package registers every `*_model.py` in BasicSR's MODEL_REGISTRY."""

from moeisr_basicsr.registration import import_by_suffix

import_by_suffix(__name__, __path__, '_model')
