"""Whole models, built from layers; `registry` finds one by the name in config.json."""
