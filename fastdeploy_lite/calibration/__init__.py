"""Quantisation that watches the model at work: text in, activations layer by layer, weights out."""
