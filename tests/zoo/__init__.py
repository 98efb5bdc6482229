"""Networks to test on: small ones of every kind (`modules`) and trained ones that nobody here wrote (`pretrained`)."""
