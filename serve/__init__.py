"""The Ray Serve application: an OpenAI-compatible endpoint that answers with any adapter of a store.

`app` holds configuration, deployment graph, start and stop. `gateway` is HTTP: `completions`, `models` and `documents`
have its routes, `backend` what they share, `protocol` and `responses` OpenAI's requests and answers, `model_names`
reads what a request asks for, `errors` says what went wrong, `body_limit` what is too large. `catalogue_deployment`
writes the catalogue and holds `keys` to their `limits`; `feed` tells the gateways, whose `directory` is what they know.
`internalizer` makes adapters of uploaded documents, `selector` finds the one that a question is about. `engine` owns
the base model: `adapter_cache` keeps adapters in memory, `batcher` lets requests join and leave, `decoding` takes one
batch through the model, `text_stream` makes text of tokens.
"""
