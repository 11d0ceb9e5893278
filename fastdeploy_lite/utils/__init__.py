"""Helpers that every layer may use; they import nothing else of the package."""

from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
