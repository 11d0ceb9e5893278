"""Measuring the kernels against ceilings of the same machine, taken in the same run."""
