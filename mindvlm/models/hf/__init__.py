"""Readers of config.json files and tensor names that several families share."""
