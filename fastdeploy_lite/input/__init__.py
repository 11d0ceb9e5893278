"""From what a user writes to token ids: tokenizer, chat template, request checks."""
