"""The Ray Serve application: an OpenAI-compatible endpoint that answers with any adapter of a store.

`app` holds configuration, deployment graph, start and stop. `gateway` is HTTP and the names in it, `catalogue` the one
writer of the catalogue, `engine` the base model with many adapters, `routing` which engine a request goes to,
`internalizer` makes adapters of uploaded documents, `selector` finds documents by meaning, `errors` says what went
wrong. A package that is a deployment has it in a module `deployment`.
"""
