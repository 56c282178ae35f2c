"""Training of draft heads: texts, shards of the target's hidden states, and the trainer."""
