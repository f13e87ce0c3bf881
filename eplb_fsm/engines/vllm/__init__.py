"""vLLM rebalances with this library: a plugin that it finds by itself, and does nothing unless it is asked to.

``--enable-eplb-rebalance-async`` of ``eplb-fsm vllm``, or the variable ``ENABLE_EPLB_REBALANCE_ASYNC=1``, asks.
"""
