"""Loading, resizing, normalizing and tiling of images, and the tokens that stand for them."""
