"""Models. The package registers every `*_model.py` in BasicSR's MODEL_REGISTRY."""
