"""What a request and its answer are made of: below engine and input, read by both."""
