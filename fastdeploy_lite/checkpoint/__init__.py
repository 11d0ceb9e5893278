"""Checkpoint files: named host arrays out of folders, and folders out of named arrays.

Nothing here imports Paddle: reading, checking and writing need numpy only.
"""
