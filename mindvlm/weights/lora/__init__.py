"""PEFT adapters: reading them and merging them into their base."""
