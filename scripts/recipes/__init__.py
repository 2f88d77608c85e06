"""How each embedded model is trained: one file a model. `scripts/train_zoo.py` runs them."""
