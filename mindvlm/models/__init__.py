"""Model families, one folder each, and the readers that they share."""
