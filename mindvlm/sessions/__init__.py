"""What a user does with a loaded model: chat, batches, conversations, sequences of pictures."""
