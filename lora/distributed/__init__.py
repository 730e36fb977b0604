"""Several processes that train one model: start and end, collectives, sharded weights."""
