"""Data. The package registers every `*_dataset.py` in BasicSR's DATASET_REGISTRY.

Importing this folder also puts `repeatable.EnlargedSampler` in the place of BasicSR's in BasicSR's own training loop:
without it the repeats of an image within an epoch, and the epochs themselves, would draw the same patches.
"""

import basicsr.train

from .repeatable import EnlargedSampler

basicsr.train.EnlargedSampler = EnlargedSampler
