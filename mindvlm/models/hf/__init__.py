"""Readers of config.json files that families share."""
