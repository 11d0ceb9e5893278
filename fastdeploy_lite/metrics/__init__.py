"""Prometheus metrics under upstream's names."""
