"""Structured output: a specification, its compiler, and a matcher for each request."""
