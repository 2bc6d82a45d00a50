"""The only room that imports deepspeed: the engine, its state layout, the sharded EMA, recompute policies."""
