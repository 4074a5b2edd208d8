"""The catalogue deployment: writes events, tells all gateways what is new, knows API keys and counts their limits."""
