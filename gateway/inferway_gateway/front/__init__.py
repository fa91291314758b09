"""Several processes that listen, in front of the one that holds the models.

The owner process has the registry, the batchers, the workers and the catalog; it is the whole gateway but for its
public port. Each front process listens on that port (``SO_REUSEPORT``), parses HTTP, checks keys, decodes and encodes
tensors, and hands every inference to the owner over a Unix socket, where the requests of all fronts share batches.
Every other request is passed on to the owner as it is, over a second Unix socket that speaks HTTP.
"""
