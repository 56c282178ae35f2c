"""Pure values of decoding: trees, acceptance, sampling, stopping, slots, results. Nothing here imports transformers."""
