"""The TinyLLaVA family."""
