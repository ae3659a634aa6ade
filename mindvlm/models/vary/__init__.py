"""Vary-toy and its small sibling Vary-nano."""
