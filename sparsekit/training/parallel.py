"""A model laid out over the processes that train it."""

from __future__ import annotations

from sparsekit.model.decoder import Decoder
from sparsekit.training.distributed import World


def parallelise(model: Decoder, world: World, compile_layers: bool) -> None:
    """Compiles the layers, if asked, and shards the weights over all ranks, layer by layer, in place.

    Each rank holds a part of every weight, of its gradient and of its optimizer state, and gathers a layer's weights
    while the layer runs. Gradients are averaged over ranks.

    Source: Zhao et al. 2023, arXiv 2304.11277 (FSDP); per-parameter sharding as in PyTorch's fully_shard
    """
    if compile_layers:
        for layer in model.layers:
            layer.compile()
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("data",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
