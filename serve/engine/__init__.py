"""The engine deployment: continuous batching, keys and values, adapters in memory and on disk, tokens to text."""
