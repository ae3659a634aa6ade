"""Tokenizers, chat templates, streaming of decoded text."""
