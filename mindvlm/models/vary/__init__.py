"""The Vary family."""
