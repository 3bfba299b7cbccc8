"""Data. Importing this package registers every `*_dataset.py` in BasicSR's DATASET_REGISTRY.

It also puts `EnlargedSampler` in the place of BasicSR's in BasicSR's own training loop: without it the repeats of an
image within an epoch, and the epochs themselves, would draw the same patches.
"""

import basicsr.train

from moeisr_basicsr.registration import import_by_suffix

from .repeatable import EnlargedSampler

import_by_suffix(__name__, __path__, '_dataset')
basicsr.train.EnlargedSampler = EnlargedSampler
