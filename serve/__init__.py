"""The Ray Serve application: an OpenAI-compatible endpoint that answers with any adapter of a store.

`app` holds configuration, deployment graph, start and stop. `gateway` is HTTP: `protocol` has OpenAI's requests and
responses, `model_names` reads what a request asks for, `errors` says what went wrong. `engine` owns the base model:
`adapter_cache` keeps adapters in memory, `batcher` gathers requests, `decoding` takes one batch through the model,
`text_stream` makes text of tokens.
"""
