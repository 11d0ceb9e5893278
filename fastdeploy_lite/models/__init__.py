"""Model families: a folder each, chosen by `architectures` before config.json is understood.

Everything but a family's `model` module needs numpy only.
"""
