"""Training of draft heads: texts, shards with the target's hidden states, and the trainer."""
