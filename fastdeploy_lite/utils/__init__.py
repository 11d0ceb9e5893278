"""Helpers that every layer may use; they import nothing else of the package."""
