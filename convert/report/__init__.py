"""The record of a conversion: statistics of tensors, their origins, the JSON file."""
