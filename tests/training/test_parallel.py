"""Layouts over processes: one model, one loss, one gradient, whatever the layout, and each process holds its part."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import FORKS, PATIENCE, free_port
from test_resume import rows, tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekit.components.contracts import ForwardContext, counters
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model, materialise
from sparsekit.model.decoder import Decoder
from sparsekit.model.targets import Run
from sparsekit.spec.load import validate
from sparsekit.spec.run import RunSpec
from sparsekit.training.distributed import World
from sparsekit.training.gradients import Gradients, local
from sparsekit.training.parallel import Layout, check_sizes, last_micro_batch, parallelise
from sparsekit.training.recompute import recompute
from sparsekit.training.run import train
from sparsekit.training.statistics import LayerStatistics

Make = Callable[..., dict[str, Any]]


# --- what a spec may say


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"activation_checkpoint": "some"},
         "parallel.activation_checkpoint: expected 'none', 'full', 'selective', or n for every n-th layer, got 'some'"),
        ({"activation_checkpoint": 0},
         "parallel.activation_checkpoint: expected 'none', 'full', 'selective', or n for every n-th layer, got 0"),
        ({"activation_checkpoint": True},
         "parallel.activation_checkpoint: expected 'none', 'full', 'selective', or n for every n-th layer, got True"),
        ({"data": "zero"}, "parallel.data: expected 'fsdp' or 'ddp', got \"zero\""),
        ({"expert": 0}, "parallel.expert: expected greater than 0, got 0"),
        ({"tensors": 2}, "parallel: unknown key 'tensors' (did you mean 'tensor'?)"),
    ],
)  # fmt: skip
def test_mistakes_in_one_line(raw: dict[str, Any], given: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError) as error:
        validate(raw | {"parallel": given})
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(told)


def test_compile_names(raw: dict[str, Any]) -> None:
    for value in (True, False, "layers", "model"):
        raw["train"]["compile"] = value
        assert validate(raw).train.compile is value
    raw["train"]["compile"] = "blocks"
    with pytest.raises(SpecError) as error:
        validate(raw)
    assert error.value.problems == ["train.compile: expected true, false, 'layers' or 'model', got 'blocks'"]


@pytest.mark.parametrize(
    ("parallel", "n", "told"),
    [
        ({"tensor": 2}, 1, "parallel.tensor: 2 does not divide the number of processes, 1; start a multiple of 2 with "
                           "torchrun, or set it to 1"),
        ({"tensor": 2, "expert": 4}, 4,
         "parallel.expert: 4 does not divide the number of processes that read different data, 2 (of 4, 2 share each "
         "batch); start a multiple of 8 with torchrun, or set it to 1"),
    ],
)  # fmt: skip
def test_sizes(raw: dict[str, Any], parallel: dict[str, Any], n: int, told: str) -> None:
    spec = validate(raw | {"parallel": parallel}).parallel
    with pytest.raises(SpecError) as error:
        check_sizes(spec, n)
    assert error.value.problems == [told]
    check_sizes(spec, 8)


# --- activation checkpointing, in one process


class Living(TorchDispatchMode):
    """Bytes of the tensors that were made in it and are still held, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= n_bytes


def deep(make: Make, moe: Make) -> dict[str, Any]:
    """Four layers, dense and mixtures in turn, with random numbers in the forward and losses beside the main one."""
    router = {"type": "top_k", "k": 2, "jitter": 0.2, "load_balance": 0.5, "z_loss": 0.1}
    layers = {"1": {"ffn": moe(router=router)}, "3": {"ffn": moe(router={"type": "noisy_top_k", "k": 2})}}
    return make(n_layers=4, layers=layers)


def one_step(spec: dict[str, Any], which: Any) -> dict[str, Any]:
    """Everything that a training step comes to, and the bytes that wait for its backward."""
    model = build_model(spec, seed=1)
    recompute(model, which)
    ids_BT = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(2))
    statistics = LayerStatistics(model)
    torch.manual_seed(3)
    context = ForwardContext(loss_scale=torch.tensor(0.7))
    with Living() as living:
        logits = model(ids_BT, context)
        kept = living.now
    del logits
    torch.manual_seed(3)
    with statistics.collecting(1.0):
        loss = nn.functional.cross_entropy(model(ids_BT, context).flatten(0, 1), ids_BT.flatten())
        loss.backward()
    told = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    told |= {f"{name}.{counter}": value.clone() for name, counter, value in counters(model)}
    return {"kept": kept, "loss": loss.detach(), "random": torch.rand(1), **told, **statistics.rows()}


def test_recomputed_is_the_same_in_less_memory(tiny: Make, moe: Make) -> None:
    spec = deep(tiny, moe)
    plain = one_step(spec, "none")
    kept = {"none": plain.pop("kept")}
    for which in ("full", "selective", 2, 3):
        told = one_step(spec, which)
        kept[which] = told.pop("kept")
        assert told.keys() == plain.keys()
        assert [key for key in plain if not torch.equal(torch.as_tensor(told[key]), torch.as_tensor(plain[key]))] == []
    assert kept["full"] < kept[2] < kept[3] < kept["none"]
    assert kept["full"] < kept["selective"] < 0.7 * kept["none"], kept
    assert kept["full"] < 0.25 * kept["none"], kept  # logits, and each layer's input


def test_which_layers_recompute(tiny: Make) -> None:
    def calls(which: Any) -> list[int]:
        model = build_model(tiny(n_layers=5))
        recompute(model, which)
        seen = [0] * 5
        for index, layer in enumerate(model.layers):
            layer.ffn.register_forward_pre_hook(lambda *_, index=index: seen.__setitem__(index, seen[index] + 1))
        model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        return seen

    assert calls("none") == [1, 1, 1, 1, 1]
    assert calls("full") == calls("selective") == calls(1) == [2, 2, 2, 2, 2]
    assert calls(2) == [1, 2, 1, 2, 1]
    assert calls(3) == [1, 1, 2, 1, 1]


class Counting(TorchDispatchMode):
    """How often each operator ran in it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def test_selective_runs_no_matrix_product_twice(tiny: Make, moe: Make) -> None:
    """Each product once forward and twice backward, attention once each way."""

    def counted(which: str) -> dict[str, int]:
        model = build_model(deep(tiny, moe))
        recompute(model, which)
        with Counting() as counting:
            model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        return counting.counts

    none, selective, full = counted("none"), counted("selective"), counted("full")
    for name in ("aten::mm", "sparsekit::grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert none[name] == selective[name] < full[name], name
    assert selective["aten::silu"] == full["aten::silu"] == 2 * none["aten::silu"]


def test_names_stay(tiny: Make, moe: Make) -> None:
    plain, wrapped = (build_model(deep(tiny, moe)) for _ in range(2))
    recompute(wrapped, "selective")
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in wrapped.named_modules()]


# --- shards without other processes: a group that only pretends to be one


@contextmanager
def pretended(rank: int, n: int) -> Iterator[World]:
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _clear_sharding_prop_cache()  # which would hand out the mesh of the rank before
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
    try:
        yield World(torch.device("cpu"), rank, n)
    finally:
        torch.distributed.destroy_process_group()


def laid_out(spec: RunSpec, world: World) -> Decoder:
    from dataclasses import replace

    dtype = torch.bfloat16 if spec.train.precision == "pure_bf16" else torch.float32
    model = build_model(spec.model, device="meta", dtype=dtype)
    parallelise(model, spec, replace(world, tensor=spec.parallel.tensor))
    return model


@pytest.fixture
def mixed(raw: dict[str, Any]) -> dict[str, Any]:
    """Sizes that processes cannot share evenly, masks, and a mixture."""
    raw["model"]["d_model"] = 20
    raw["model"]["linear"] = {"type": "masked", "sparsity": 0.5}
    raw["model"]["block"]["attention"] |= {
        "head_dim": 6,
        "qk_norm": "rmsnorm",
        "bias": True,
        "sink_logits": True,
        "kernel": "eager",
    }
    raw["train"]["seed"] = 5
    return raw


LAYOUTS = [
    {}, {"data": "ddp"}, {"tensor": 2}, {"expert": 2}, {"expert": 4}, {"tensor": 2, "expert": 2},
    {"tensor": 2, "expert": 2, "data": "ddp"},
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_first_weights_are_those_of_one_process(
    mixed: dict[str, Any], parallel: dict[str, Any], precision: str
) -> None:
    """Bit for bit: every process's shards are parts of the whole, at the place that the checkpoint gives them."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as place_of

    mixed["train"]["precision"] = precision
    spec = validate(mixed | {"parallel": parallel})
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    whole = build_model(spec.model, seed=5, dtype=dtype).state_dict()
    covered = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}
    for rank in range(4):
        with pretended(rank, 4) as world:
            for name, tensor in laid_out(spec, world).state_dict().items():
                part = local(tensor)
                place = [slice(None)] * part.ndim
                if part is not tensor:
                    shape, offset = place_of(tensor.shape, tensor.device_mesh, tensor.placements)
                    assert tuple(part.shape) == tuple(shape)
                    place = [slice(start, start + size) for start, size in zip(offset, shape, strict=True)]
                assert part.dtype == whole[name].dtype
                assert torch.equal(part, whole[name][tuple(place)]), (rank, name)
                covered[name][tuple(place)] = True
    assert [name for name, seen in covered.items() if not seen.all()] == []


def test_never_more_than_one_module_is_whole(raw: dict[str, Any]) -> None:
    raw["model"] |= {"d_model": 64, "n_layers": 6}
    spec = validate(raw)
    with pretended(3, 8) as world:
        layout = Layout(spec.parallel, world)
        model = build_model(spec.model, device="meta")
        layout.shard(model, "fp32")
        with Living() as living:
            materialise(model, 0, "cpu")
        shards = sum(local(p).untyped_storage().nbytes() for p in model.parameters())
        buffers = sum(local(b).nbytes for b in model.buffers())
        modules = [sum(4 * p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    whole = sum(modules)
    tables = 4 * 8 * 16 * 16  # cosines and sines are worked out in float64
    assert shards < 0.15 * whole
    assert shards <= living.most <= shards + buffers + max(modules) + tables
    assert living.most < 0.5 * whole


@pytest.mark.parametrize(
    ("data", "operator", "early", "late"), [("ddp", "allreduce", 0, 3), ("fsdp", "reduce_scatter", 3, 3)]
)
def test_when_gradients_are_averaged(raw: dict[str, Any], data: str, operator: str, early: int, late: int) -> None:
    """Of two layers and the rest: after each micro-batch where they are sharded, after the last where they are not."""
    spec = validate(raw | {"parallel": {"data": data}})
    with pretended(0, 2) as world:
        model = laid_out(spec, world)
        model(torch.zeros(1, 4, dtype=torch.long))
        for last, expected in ((False, early), (True, late)):
            last_micro_batch(model, spec.parallel, last)
            loss = model(torch.zeros(1, 4, dtype=torch.long)).sum()
            with Counting() as counting:
                loss.backward()
            found = {name: n for name, n in counting.counts.items() if name.startswith("c10d::")}
            assert sum(n for name, n in found.items() if operator in name) == expected, found


def test_what_each_process_holds(raw: dict[str, Any]) -> None:
    spec = validate(raw | {"parallel": {"tensor": 2, "expert": 2}})
    with pretended(1, 8) as world:
        model: Any = laid_out(spec, world)
        gradients = Gradients(model, world)
        told = {name: (str(p.placements), p.device_mesh.mesh_dim_names, tuple(p.shape), tuple(p.to_local().shape))
                for name, p in model.named_parameters()}  # fmt: skip
        shares = {name: share.item() for name, share in gradients._shares.items()}
    strided = "_StridedShard(dim=0, sf=2)"
    layer, experts = "layers.1", "layers.1.ffn.experts"
    assert told[f"{layer}.attention.q.weight"] == (f"({strided}, Shard(dim=0))", ("data", "tensor"), (16, 16), (2, 16))
    assert told[f"{layer}.attention.o.weight"] == ("(Shard(dim=0), Shard(dim=1))", ("data", "tensor"), (16, 16), (4, 8))
    assert told[f"{experts}.up.weight"] == (
        f"({strided}, Shard(dim=0), Shard(dim=1))", ("data", "expert", "tensor"), (4, 16, 16), (1, 8, 16),
    )  # fmt: skip
    assert told[f"{experts}.down.weight"][3] == (1, 16, 8)
    assert told["norm.weight"] == ("(Shard(dim=0),)", ("data",), (16,), (4,))
    assert shares["norm.weight"] == 0.5 and shares[f"{experts}.up.weight"] == 1.0


@pytest.mark.parametrize(
    ("model", "parallel", "told"),
    [
        ({}, {"tensor": 4}, "parallel.tensor: 4 processes cannot share layers.0.attention: n_kv_heads (2) cannot be "
                            "divided by 4"),
        ({"ffn": {"type": "swiglu", "d_ff": 25}}, {"tensor": 2},
         "parallel.tensor: 2 processes cannot share layers.0.ffn: d_ff (25) cannot be divided by 2"),
        ({"ffn": {"type": "top_k_ffn", "d_ff": 24, "k": 4}}, {"tensor": 2},
         "parallel.tensor: 2 processes cannot share layers.0.ffn: the k largest are chosen among all neurons, so these "
         "cannot be divided"),
        ({}, {"expert": 8}, "parallel.expert: 8 processes cannot share layers.1.ffn: n_experts (4) cannot be divided "
                            "by 8"),
        ({"layers": {}}, {"expert": 2}, "parallel.expert: the model has no experts to divide; leave it at 1"),
        ({"layers": {"1": {"ffn": {"dispatch": "loop"}}}}, {"expert": 2},
         "parallel.expert: 2 processes cannot share layers.1.ffn: its experts run one after the other, as they cannot "
         "be grouped or dispatch is 'loop'"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided(
    raw: dict[str, Any], model: dict[str, Any], parallel: dict[str, Any], told: str
) -> None:
    if "ffn" in model:
        raw["model"]["block"]["ffn"] = model["ffn"]
    if "layers" in model:
        raw["model"]["layers"]["1"]["ffn"] |= model["layers"].get("1", {}).get("ffn", {})
        if not model["layers"]:
            del raw["model"]["layers"]
    spec = validate(raw | {"parallel": parallel})
    with pretended(0, 8) as world, pytest.raises(SpecError) as error:
        laid_out(spec, world)
    assert error.value.problems == [told]


# --- real processes: several runs in each start


def _work(cases: list[tuple[str, dict[str, Any]]], folder: Path, rank: int, n: int, port: int) -> None:
    """Trains one spec after the other, and notes down what each process holds before the first step."""
    from sparsekit.training import trainer

    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)})
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=n)
    real = trainer.Trainer.fit

    def fit(self: Any) -> None:
        if self.progress.step == 0:
            shapes = {name: list(local(p).shape) for name, p in self.model.named_parameters()}
            (self.run.folder / f"shapes-{rank}.json").write_text(json.dumps(shapes))
        real(self)

    trainer.Trainer.fit = fit  # type: ignore[method-assign]
    for name, raw in cases:
        train(validate(raw), out=folder / name)
    torch.distributed.destroy_process_group()


def in_processes(n: int, cases: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    port = free_port()
    processes = [FORKS.Process(target=_work, args=(cases, folder, rank, n, port), daemon=True) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * n


@pytest.fixture
def twenty(raw: dict[str, Any]) -> dict[str, Any]:
    """Twenty steps of two micro-batches, each of statistics too."""
    raw["train"] |= {"max_steps": 20, "schedule": "constant", "statistics": {"every": 4, "moments": False}}
    raw["train"]["optimizer"]["lr"] = 3e-3
    return raw


def with_(raw: dict[str, Any], parallel: dict[str, Any], **settings: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw) | {"parallel": parallel}
    raw["train"] |= settings
    return raw


def zoo(raw: dict[str, Any]) -> dict[str, Any]:
    """Whatever can be divided among processes that share a batch, one kind a layer."""
    raw = copy.deepcopy(raw)
    swiglu = {"type": "swiglu", "d_ff": 16}
    attentions = [
        {"type": "mla", "n_heads": 4, "kv_rank": 8, "q_rank": 6, "rope_head_dim": 4, "output_gate": True},
        {
            "type": "mqa",
            "n_heads": 4,
            "position": "alibi",
            "sink_logits": True,
            "qk_norm": "rmsnorm",
            "kernel": "eager",
        },
        {"type": "mha", "n_heads": 4, "position": "learned", "bias": True, "window": 4, "sinks": 1},
        {
            "type": "gqa",
            "n_heads": 4,
            "n_kv_heads": 2,
            "position": "none",
            "kernel": "eager",
            "normalizer": "sparsemax",
        },
    ]
    ffns: list[dict[str, Any]] = [
        {"type": "mlp", "d_ff": 24, "bias": True},
        {"type": "moe", "n_experts": 4, "expert": swiglu, "shared_expert": swiglu,
         "router": {"type": "top_k", "k": 2, "jitter": 0.1, "bias_rate": 0.01}},
        {"type": "moe", "n_experts": 4, "expert": {**swiglu, "bias": True}, "router": "switch"},
        {"type": "moe", "n_experts": 2, "expert": {"type": "mlp", "d_ff": 8}, "dispatch": "loop"},
    ]  # fmt: skip
    raw["model"] |= {"n_layers": 4, "linear": {"type": "masked", "sparsity": 0.3, "roles": ["up", "down", "o"]}}
    raw["model"]["layers"] = {
        str(i): {"attention": a, "ffn": f} for i, (a, f) in enumerate(zip(attentions, ffns, strict=True))
    }
    raw["train"] |= {"max_steps": 6}
    return raw


def compare(n: int, cases: dict[str, tuple[dict[str, Any], dict[str, Any], float]], folder: Path) -> None:
    """Trains each (spec, layout, limit of the loss) in n processes and in one: the same numbers and weights."""
    in_processes(n, [(name, with_(raw, parallel)) for name, (raw, parallel, _) in cases.items()], folder)
    for name, (raw, _, rel) in cases.items():
        one, many = train(validate(raw), out=folder / f"{name} alone"), Run(folder / name)
        for a, b in zip(rows(one), rows(many), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                limit = rel if key in ("loss", "val_loss") else 1e-5
                assert b[key] == pytest.approx(a[key], rel=limit, abs=1e-7), (name, a["step"], key)
        a, b = (tensors(run.checkpoints[-1]) for run in (one, many))
        for key in a:
            if key.startswith("model."):
                torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
            elif key.startswith("optimizer.exp_avg/"):  # gradients, of which Adam's updates do not tell the size
                # a key's bias moves no softmax, so that its gradient is rounding alone
                assert (a[key] - b[key]).abs().max() <= 1e-3 * a[key].abs().max() + 1e-11, (name, key)


def shapes(folder: Path, rank: int) -> dict[str, list[int]]:
    """Of what a process held, by name of the parameter."""
    found: dict[str, list[int]] = json.loads((folder / f"shapes-{rank}.json").read_text())
    return found


def test_two_processes_are_one(twenty: dict[str, Any], tmp_path: Path) -> None:
    """Losses, norms, statistics and weights, over 20 steps; and each process holds its part."""
    selective = {"expert": 2, "activation_checkpoint": "selective"}
    cases = {
        "fsdp": (twenty, {}, 1e-6),
        "tensor": (twenty, {"tensor": 2, "activation_checkpoint": "full"}, 1e-5),
        "expert": (twenty, selective, 1e-5),
    }
    compare(2, cases, tmp_path)
    up, o = "layers.1.ffn.experts.up.weight", "layers.1.attention.o.weight"
    held = {name: [shapes(tmp_path / name, rank) for rank in range(2)] for name in cases}
    assert [(part[up], part[o]) for part in held["fsdp"]] == [([2, 16, 16], [8, 16])] * 2
    assert [(part[up], part[o]) for part in held["tensor"]] == [([4, 8, 16], [16, 8])] * 2
    assert [(part[up], part[o]) for part in held["expert"]] == [([2, 16, 16], [8, 16])] * 2


@pytest.mark.slow
def test_more_of_two_processes(twenty: dict[str, Any], tmp_path: Path) -> None:
    """DDP with two micro-batches a step; everything that can be divided; a mixture of which one process gets no token;
    and a run that goes from one layout to the next."""
    text = tmp_path / "a.txt"
    text.write_text("a" * 4000)
    alone = with_(twenty, {}, max_steps=3)
    alone["data"]["source"] |= {"path": str(text)}
    alone["model"]["layers"]["1"]["ffn"]["router"] = {"type": "hash", "k": 1}
    cases = {
        "ddp": (with_(twenty, {}, micro_batch_size=2), {"data": "ddp"}, 1e-6),
        "zero 2": (with_(twenty, {}, micro_batch_size=2), {"reshard_after_forward": False}, 1e-6),
        "zoo": (zoo(twenty), {"tensor": 2}, 1e-5),
        "lonely": (alone, {"expert": 2}, 1e-5),
    }
    compare(2, cases, tmp_path)
    assert shapes(tmp_path / "ddp", 1)["layers.1.ffn.experts.up.weight"] == [4, 16, 16]
    save = {"checkpoint_every": 5, "keep": {"last": 9}}
    turns = [({"tensor": 2}, 5), ({"expert": 2}, 10), ({"data": "ddp"}, 15)]
    in_processes(2, [("turns", with_(twenty, parallel, max_steps=n, **save)) for parallel, n in turns], tmp_path)
    last = train(validate(with_(twenty, {}, **save)), out=tmp_path / "turns")
    one = train(validate(twenty), out=tmp_path / "one")
    assert [row["loss"] for row in rows(last)] == pytest.approx([row["loss"] for row in rows(one)], rel=1e-5)


@pytest.mark.slow
def test_four_processes(twenty: dict[str, Any], tmp_path: Path) -> None:
    """Two kinds of parallelism at a time, and three."""
    quarter = with_(twenty, {}, micro_batch_size=2)
    quarter["model"]["layers"]["1"]["ffn"]["expert"]["bias"] = True
    layouts: dict[str, dict[str, Any]] = {
        "fsdp, tensor": {"tensor": 2},
        "fsdp, expert": {"expert": 2, "activation_checkpoint": "selective"},
        "all": {"tensor": 2, "expert": 2, "activation_checkpoint": 2},
        "ddp, expert": {"data": "ddp", "expert": 2},
        "ddp, tensor": {"data": "ddp", "tensor": 2},
    }
    compare(4, {name: (quarter, layout, 1e-5) for name, layout in layouts.items()}, tmp_path)


@pytest.mark.slow
def test_low_precision_is_gathered_low(twenty: dict[str, Any], tmp_path: Path) -> None:
    """In bf16 the losses are those of one process as closely as bf16 lets them be; in pure bf16 as closely as that."""
    cases = {precision: with_(twenty, {}, precision=precision) for precision in ("bf16", "pure_bf16")}
    in_processes(2, list(cases.items()), tmp_path)
    exact = [row["loss"] for row in rows(train(validate(twenty), out=tmp_path / "exact"))]
    for name, raw in cases.items():
        one = [row["loss"] for row in rows(train(validate(raw), out=tmp_path / f"{name} alone"))]
        two = [row["loss"] for row in rows(Run(tmp_path / name))]
        noise = max(abs(a - b) for a, b in zip(exact, one, strict=True))
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < noise, name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled(twenty: dict[str, Any], tmp_path: Path, how: str) -> None:
    """With inductor, recomputing and divided too."""
    twenty["train"] |= {"max_steps": 4, "statistics": None}
    compiled = with_(twenty, {}, compile=how)
    cases = {"fsdp": {"activation_checkpoint": "selective"}, "tensor": {"tensor": 2}, "expert": {"expert": 2}}
    in_processes(2, [(name, compiled | {"parallel": layout}) for name, layout in cases.items()], tmp_path)
    one = [row["loss"] for row in rows(train(validate(twenty), out=tmp_path / "one"))]
    for name in cases:
        assert [row["loss"] for row in rows(Run(tmp_path / name))] == pytest.approx(one, rel=1e-5), name
