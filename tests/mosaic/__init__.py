"""Mosaic: a family that exists only in the tests. It sees the mean colour of each cell of a picture and answers with a
small Llama. Its folder and one registry row are all that it takes; `tests/models/test_registry.py` adds the row."""
