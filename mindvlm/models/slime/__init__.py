"""The SliME family: high-resolution pictures as a global view and local crops (arXiv 2406.08487)."""
