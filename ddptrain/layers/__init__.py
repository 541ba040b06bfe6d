"""Looks into a model while it trains: what passes through its layers, forward and backward."""

from ddptrain.layers.watch import Layers

__all__ = ["Layers"]
