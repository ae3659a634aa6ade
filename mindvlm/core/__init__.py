"""Errors, typed configs from YAML, the runtime, interruption: what every other package may import."""
