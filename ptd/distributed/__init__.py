"""Processes: ranks and groups, rendezvous and self-test, sharding by DeepSpeed ZeRO-3, the network meter."""
