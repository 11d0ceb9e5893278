"""The engine: requests in, tokens out; scheduling, KV blocks, the process boundary."""
