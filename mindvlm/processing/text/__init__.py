"""Tokenizers, chat templates and incremental decoding."""
