"""Text generation: compiled prefill and decode, sampling, stopping, streaming."""
