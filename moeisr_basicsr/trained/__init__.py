"""Networks that others have trained: read from their files, cut where their features are still of LR size, measured."""
