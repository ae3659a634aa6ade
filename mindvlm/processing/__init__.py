"""Text and pictures to model inputs: tokenizers, chat templates with their label masks, image transforms."""
