"""Evaluations of hypernetworks: what documents are worth as adapters, beside what they are worth in the prompt."""
