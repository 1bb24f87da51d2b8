"""Learned renderers: networks that are trained on real faces and then draw forged ones."""
