"""The gateway deployment: HTTP as OpenAI has it, and names resolved to adapters."""
