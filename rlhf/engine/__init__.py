"""Machines: processes, sharding and optimizer steps. The only package that imports DeepSpeed and torch.distributed."""
