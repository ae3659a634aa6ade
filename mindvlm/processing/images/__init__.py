"""Loading, trimming, resizing, normalization and tiling of pictures, and their place in text."""
