"""The hub's files: names to folders, config.json, weights, tokenizers."""
