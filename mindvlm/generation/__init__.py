"""Compiled prefill and decode, sampling, stopping, streaming."""
