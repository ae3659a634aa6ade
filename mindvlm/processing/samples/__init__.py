"""Training samples: records to token ids and label masks."""
