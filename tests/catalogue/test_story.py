"""What if layers 0-3 used dynamic_tanh and a window of 128, and every fourth layer were a MoE with expert choice?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekit.errors import SpecError
from sparsekit.model.accounting import describe
from sparsekit.model.targets import Run
from sparsekit.spec.load import load_spec
from sparsekit.spec.run import RunSpec
from sparsekit.training.run import train
from sparsekit.training.trainer import Trainer

AS_EXCEPTIONS = """\
{"extends": "base.json", "name": "what_if", "model": {"layers": {
  "0:4": {"norm": "dynamic_tanh", "attention": {"window": 128}},
  "3::4": {"ffn": {"type": "moe", "n_experts": 8, "router": "expert_choice",
                   "expert": {"type": "swiglu", "d_ff": 24}}}
}}}
"""
AS_A_PATTERN = """\
{"extends": "no_blocks.json", "name": "what_if", "model": {
  "blocks": {"dense": {"extends": "block.json"}, "moe": {"extends": "block.json", "ffn": {"type": "moe",
             "n_experts": 8, "router": "expert_choice", "expert": {"type": "swiglu", "d_ff": 24}}}},
  "pattern": ["dense", "dense", "dense", "moe"],
  "layers": {":4": {"norm": "dynamic_tanh", "attention": {"window": 128}}}}}
"""


@pytest.fixture
def base(run_of: Callable[..., dict[str, Any]], tmp_path: Path) -> RunSpec:
    """A plain model of 12 layers, in files beside which the question can be written."""
    block = {"norm": "rmsnorm", "attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2},
             "ffn": {"type": "swiglu", "d_ff": 48}}  # fmt: skip
    sizes = {"d_model": 32, "n_layers": 12, "vocab_size": 257, "max_seq_len": 256}
    raw = run_of({**sizes, "block": block}, max_steps=3, micro_batch_size=2, eval_tokens=256)
    for name, content in (("base", raw), ("no_blocks", {**raw, "model": sizes}), ("block", block)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return load_spec(tmp_path / "base.json")


@pytest.mark.parametrize("question", [AS_EXCEPTIONS, AS_A_PATTERN], ids=["exceptions", "pattern"])
def test_it_is_five_lines(question: str, base: RunSpec, tmp_path: Path) -> None:
    assert len(question.splitlines()) == 5
    assert max(map(len, question.splitlines())) <= 120
    path = tmp_path / "what_if.json"
    path.write_text(question)
    spec = load_spec(path)

    before = base.model.per_layer[0]
    assert len(spec.model.per_layer) == 12
    for index, block in enumerate(spec.model.per_layer):
        assert block.norm.type == ("dynamic_tanh" if index < 4 else "rmsnorm")
        attention = block.attention.params
        assert attention.window == (128 if index < 4 else None)
        assert attention.model_copy(update={"window": None}) == before.attention.params, "and no more than that"
        assert block.residual == before.residual
        if index in (3, 7, 11):
            ffn = block.ffn.params
            assert (block.ffn.type, ffn.router.type, ffn.n_experts) == ("moe", "expert_choice", 8)
            assert (ffn.expert.type, ffn.expert.params.d_ff) == ("swiglu", 24)
        else:
            assert block.ffn == before.ffn
    assert spec.model.last_norm.type == "rmsnorm"
    assert describe(spec).parameters > describe(base).parameters

    with pytest.raises(SpecError, match=r"^model.allow_leak: layers\.3\.ffn\.router is not causal"):
        Trainer(spec, Run(tmp_path / "refused"))
    run = train(load_spec(path, ["model.allow_leak=true"]), out=tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert all(math.isfinite(row["loss"] + row["grad_norm"]) for row in run.metrics)
    assert run.spec.model.per_layer == spec.model.per_layer, "what is saved is what was asked"


def test_both_ways_are_the_same_model(base: RunSpec, tmp_path: Path) -> None:
    specs = []
    for question in (AS_EXCEPTIONS, AS_A_PATTERN):
        (tmp_path / "what_if.json").write_text(question)
        specs.append(load_spec(tmp_path / "what_if.json"))
    assert specs[0].model.per_layer == specs[1].model.per_layer
