"""Full Gauss-Newton on a character-level GPT: steps to a loss, beside first-order optimizers, at a large and a small batch."""
