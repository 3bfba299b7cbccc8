"""Losses. The package registers every `*_loss.py` in BasicSR's LOSS_REGISTRY."""
