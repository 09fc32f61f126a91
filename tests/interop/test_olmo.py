"""Training checkpoints of OLMo and its forks, against a forward that is written from their formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.interop.importing import import_folder
from sparsekit.interop.parity import logits_of
from sparsekit.model.targets import load_model
from sparsekit.spec.load import load_spec

D, HEADS, LAYERS, VOCABULARY, LENGTH, HIDDEN, EXPERTS = 32, 4, 3, 48, 16, 40, 4
IDS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
BASE: dict[str, Any] = {
    "d_model": D, "n_heads": HEADS, "n_layers": LAYERS, "mlp_hidden_size": 2 * HIDDEN, "vocab_size": VOCABULARY - 3,
    "embedding_size": VOCABULARY, "max_sequence_length": LENGTH, "rope": True, "flash_attention": True,
    "weight_tying": False, "include_bias": False, "layer_norm_type": "rms", "attention_dropout": 0.0,
    "eos_token_id": 0, "pad_token_id": 1, "init_device": "meta", "init_fn": "normal",
}  # fmt: skip
FORK = {
    "hidden_size": 12, "num_experts": EXPERTS, "top_k": 2, "z_loss_weight": 0.001, "lb_loss_weight": 0.01,
    "shared_mlp": {"hidden_size": 20}, "capacity_factor": 1.2, "scale_loss_by_num_layers": True,
}  # fmt: skip
OLMOE = {"block_type": "moe", "moe_num_experts": EXPERTS, "moe_top_k": 2, "moe_mlp_impl": "sparse", "rope_theta": 500}
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {"layer_norm_eps": "1e-2"},  # a string, as YAML reads what has no point
    "grouped": {"n_kv_heads": 2, "attention_layer_norm": True, "layer_norm_eps": 0.01, "rope_theta": 100},
    "queries_unscaled": {"attention_layer_norm": True, "attention_layer_norm_with_affine": False},
    "llama": {"block_type": "llama", "n_kv_heads": 1, "weight_tying": True, "scale_logits": True},
    "no_affine": {"layer_norm_type": "default", "layer_norm_with_affine": False},
    "gpt": {"layer_norm_type": "default", "include_bias": True, "activation_type": "gelu", "rope": False,
            "weight_tying": True, "multi_query_attention": True},
    "alibi": {"rope": False, "alibi": True, "activation_type": "relu", "flash_attention": False},
    "norm_after": {"norm_after": True, "attention_layer_norm": True},
    "peri": {"peri_norm": True},
    "scaled": {"layer_norm_scaling": True},
    "mixed": {"mix_norm_factor": 0.4},
    "fork_moe": {"block_type": "moe", "moe_config": FORK, "mlp_ratio": 1},
    "fork_sigmoid": {"block_type": "moe", "moe_config": {
        **FORK, "shared_mlp": None, "gating_function": "sigmoid", "normalize_expert_weights": 1.0,
        "bias_gamma": 0.001}},
    "olmoe": {**OLMOE, "attention_layer_norm": True},
    "olmoe_shared": {**OLMOE, "moe_shared_expert": True},
}  # fmt: skip


class Checkpoint:
    """A random one: its config, its tensors under the names of that code, and its forward."""

    def __init__(self, **changes: Any):
        self.c = {**BASE, **changes}
        c, self.generator = self.c, torch.Generator().manual_seed(5)
        self.tensors: dict[str, Tensor] = {}
        kv = c.get("n_kv_heads") or (1 if c.get("multi_query_attention") else HEADS)
        self.kv, width = kv, D // HEADS
        bias, affine = c["include_bias"], c.get("layer_norm_with_affine", True)
        self.draw("transformer.wte.weight", VOCABULARY, D)
        self.norm_weights("transformer.ln_f", D, affine)
        if not (c["rope"] or c.get("alibi")):
            self.draw("transformer.wpe.weight", LENGTH, D)
        if not c["weight_tying"]:
            self.linear("transformer.ff_out", D, VOCABULARY, bias)
        for i in range(LAYERS):
            at = f"transformer.blocks.{i}."
            for name in ("attn_norm", "ff_norm", *(("attn_norm_post", "ff_norm_post") if c.get("peri_norm") else ())):
                self.norm_weights(at + name, D, affine)
            if c.get("attention_layer_norm"):
                for name, n in (("q_norm", HEADS), ("k_norm", kv)):
                    self.norm_weights(at + name, n * width, c.get("attention_layer_norm_with_affine", True))
            if c.get("block_type") == "llama":
                for name, n in (("q_proj", HEADS), ("k_proj", kv), ("v_proj", kv)):
                    self.linear(at + name, D, n * width, bias)
            else:
                self.linear(at + "att_proj", D, (HEADS + 2 * kv) * width, bias)
            self.linear(at + "attn_out", D, D, bias)
            self.feed_forward(at)

    def draw(self, name: str, *shape: int, mean: float = 0.0) -> None:
        self.tensors[name] = torch.randn(*shape, generator=self.generator) * 0.2 + mean

    def linear(self, name: str, d_in: int, d_out: int, bias: bool) -> None:
        self.draw(f"{name}.weight", d_out, d_in)
        if bias:
            self.draw(f"{name}.bias", d_out)

    def norm_weights(self, name: str, width: int, affine: bool) -> None:
        if affine:
            self.draw(f"{name}.weight", width, mean=1.0)
            if self.c["include_bias"]:
                self.draw(f"{name}.bias", width)

    def feed_forward(self, at: str) -> None:
        c, moe = self.c, self.c.get("moe_config")
        if moe:
            e, f = moe["num_experts"], moe["hidden_size"]
            self.draw(f"{at}ff.router.weight", e * D)
            for w in ("w1", "w2", "w3"):
                self.draw(f"{at}ff.experts.mlp.{w}", e * f, D)
            if moe["shared_mlp"]:
                shared = moe["shared_mlp"]["hidden_size"]
                for w, d_in, d_out in (("w1", D, shared), ("w2", shared, D), ("w3", D, shared)):
                    self.linear(f"{at}ff.shared_mlp.{w}", d_in, d_out, False)
            if moe.get("bias_gamma"):
                self.draw(f"{at}ff.router.score_bias", e)
        elif c.get("block_type") == "moe":
            self.linear(f"{at}ffn.router.layer", D, EXPERTS, False)
            for w in ("w1", "v1", "w2"):
                self.draw(f"{at}ffn.experts.mlp.{w}", EXPERTS * HIDDEN, D)
            if c.get("moe_shared_expert"):
                for w, d_in, d_out in (("gate_proj", D, HIDDEN), ("up_proj", D, HIDDEN), ("down_proj", HIDDEN, D)):
                    self.linear(f"{at}ffn.shared_expert.{w}", d_in, d_out, False)
        else:
            gated = c.get("activation_type", "swiglu") == "swiglu"
            self.linear(f"{at}ff_proj", D, 2 * HIDDEN, c["include_bias"])
            self.linear(f"{at}ff_out", HIDDEN if gated else 2 * HIDDEN, D, c["include_bias"])

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        whole = {"run_name": "x", "model": self.c, "optimizer": {"name": "adamw"}, "tokenizer": {"identifier": "x"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(whole))
        torch.save(self.tensors, folder / "model.pt")
        return folder

    # --- the formulas

    def norm(self, name: str, x: Tensor) -> Tensor:
        eps = float(self.c.get("layer_norm_eps", 1e-5))
        if self.c["layer_norm_type"] == "rms":
            x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        else:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self.t(f"{name}.weight", 1.0) + self.t(f"{name}.bias", 0.0)

    def t(self, name: str, otherwise: Any = None) -> Any:
        return self.tensors[name].double() if name in self.tensors else otherwise

    def project(self, name: str, x: Tensor) -> Tensor:
        return x @ self.t(f"{name}.weight").T + self.t(f"{name}.bias", 0.0)

    def attention(self, at: str, x: Tensor) -> Tensor:
        c, width = self.c, D // HEADS
        if c.get("block_type") == "llama":
            q, k, v = (self.project(f"{at}{n}_proj", x) for n in "qkv")
        else:
            q, k, v = self.project(f"{at}att_proj", x).split([D, self.kv * width, self.kv * width], -1)
        if c.get("attention_layer_norm"):
            q, k = self.norm(f"{at}q_norm", q), self.norm(f"{at}k_norm", k)
        q, k, v = (y.unflatten(-1, (-1, width)).transpose(1, 2) for y in (q, k, v))
        steps = torch.arange(x.shape[1], dtype=torch.float64)
        if c["rope"]:
            turn = torch.outer(steps, c.get("rope_theta", 10000) ** (-torch.arange(0, width, 2).double() / width))
            angle = torch.cat((turn, turn), -1)

            def turned(y: Tensor) -> Tensor:
                a, b = y.chunk(2, -1)
                return y * angle.cos() + torch.cat((-b, a), -1) * angle.sin()

            q, k = turned(q), turned(k)
        k, v = (y.repeat_interleave(HEADS // self.kv, 1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
        if c.get("alibi"):
            slopes = 2.0 ** -(torch.arange(1, HEADS + 1).double() * 8.0 / HEADS)
            scores = scores - slopes[:, None, None] * (steps[:, None] - steps).abs()
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        return self.project(f"{at}attn_out", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def gated(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """All matrices as nn.Linear keeps them, [d_out, d_in]."""
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def mlp(self, at: str, x: Tensor) -> Tensor:
        c = self.c
        if c.get("block_type") == "moe":
            return self.mixture(at, x)
        hidden, act = self.project(f"{at}ff_proj", x), c.get("activation_type", "swiglu")
        if act == "swiglu":
            up, gate = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = getattr(F, act)(hidden)
        return self.project(f"{at}ff_out", hidden)

    def mixture(self, at: str, x: Tensor) -> Tensor:
        moe = self.c.get("moe_config")
        names = ("ff.experts.mlp.w1", "ff.experts.mlp.w3") if moe else ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1")
        down = "ff.experts.mlp.w2" if moe else "ffn.experts.mlp.w2"
        w1, up, w2 = (self.t(at + name).unflatten(0, (EXPERTS, -1)) for name in (*names, down))
        k = moe["top_k"] if moe else self.c["moe_top_k"]
        router = self.t(f"{at}ff.router.weight").view(EXPERTS, D) if moe else self.t(f"{at}ffn.router.layer.weight")
        logits = x @ router.T
        scores = logits.sigmoid() if moe and moe.get("gating_function") == "sigmoid" else logits.softmax(-1)
        chosen = (scores + self.t(f"{at}ff.router.score_bias", 0.0)).topk(k, -1).indices
        weights = scores.gather(-1, chosen)
        if moe and moe.get("normalize_expert_weights"):
            weights = weights / weights.sum(-1, keepdim=True)
        each = torch.stack([self.gated(x, w1[e], up[e], w2[e].T) for e in range(EXPERTS)], 2)  # [B, T, E, D]
        routed = (each.gather(2, chosen[..., None].expand(*chosen.shape, D)) * weights[..., None]).sum(2)
        if moe and moe["shared_mlp"]:
            shared = self.gated(x, *(self.t(f"{at}ff.shared_mlp.{w}.weight") for w in ("w1", "w3", "w2")))
            return (shared + k * routed) / (k + 1)
        if self.c.get("moe_shared_expert"):
            parts = (f"{at}ffn.shared_expert.{w}_proj.weight" for w in ("gate", "up", "down"))
            return routed + self.gated(x, *map(self.t, parts))
        return routed

    def branch(self, i: int, name: str, x: Tensor, run: Any) -> Tensor:
        c, norm = self.c, f"transformer.blocks.{i}.{name}"
        after = c.get("norm_after")
        if c.get("mix_norm_factor"):
            after = i < math.floor(LAYERS * c["mix_norm_factor"])
        if after:
            return self.norm(norm, run(x))
        y = self.norm(norm, x) * ((i + 1) ** -0.5 if c.get("layer_norm_scaling") else 1.0)
        return self.norm(f"{norm}_post", run(y)) if c.get("peri_norm") else run(y)

    def forward(self, ids: Tensor) -> Tensor:
        c = self.c
        x = self.t("transformer.wte.weight")[ids]
        if "transformer.wpe.weight" in self.tensors:
            x = x + self.t("transformer.wpe.weight")[: ids.shape[1]]
        for i in range(LAYERS):
            at = f"transformer.blocks.{i}."
            x = x + self.branch(i, "attn_norm", x, lambda y, at=at: self.attention(at, y))
            x = x + self.branch(i, "ff_norm", x, lambda y, at=at: self.mlp(at, y))
        x = self.norm("transformer.ln_f", x)
        head = "transformer.wte" if c["weight_tying"] else "transformer.ff_out"
        logits = self.project(head, x)
        return logits / math.sqrt(D) if c.get("scale_logits") else logits


@pytest.mark.parametrize("name", KINDS)
def test_a_training_checkpoint(name, tmp_path):
    made = Checkpoint(**KINDS[name])
    found = import_folder(str(made.save(tmp_path / "step100")), tmp_path / "in")
    wanted = made.forward(IDS)
    model = load_model(tmp_path / "in", dtype=torch.float64)
    assert float((logits_of(model.double(), IDS) - wanted).norm() / wanted.norm()) < 1e-6
    assert sum(found.parameters.values()) == sum(t.numel() for t in made.tensors.values())
    told = "logits not compared: transformers has no such model"
    assert found.remarks == [told, "without a tokenizer: holds no tokenizer.json"]
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]
    assert float((logits_of(model, IDS) - wanted).norm() / wanted.norm()) > 1e-3


def test_the_mixture_that_is_read_is_the_reference_architecture(tmp_path):
    """What specs/models says of it: eps, losses, and a shared expert that counts as much as a routed one."""
    import_folder(str(Checkpoint(**KINDS["fork_moe"]).save(tmp_path / "step100")), tmp_path / "in")
    found = load_spec(tmp_path / "in/spec.json").model.block
    wanted = load_spec("specs/models/moe_400m_2b.json").model.block
    assert found.norm == wanted.norm
    sizes = {"n_experts": EXPERTS, "k": 2, "d_ff": 12}
    mine, theirs = found.ffn.dump(), wanted.ffn.dump()
    assert mine["shared_expert"]["d_ff"] == 20
    for ffn in (mine, theirs):
        ffn["shared_expert"].pop("d_ff")
        ffn["n_experts"], ffn["router"]["k"], ffn["expert"]["d_ff"] = sizes.values()
    assert mine == theirs


REFUSALS = [
    ({"clip_qkv": 8.0}, "clip_qkv 8.0 has no counterpart in sparsekit"),
    ({"block_group_size": 3}, "block_group_size 3 has no counterpart in sparsekit"),
    ({"mindgap": True}, "mindgap True has no counterpart in sparsekit"),
    ({"block_type": "parallel"},
     "block_type 'parallel' has no counterpart in sparsekit; these have: sequential, llama, moe"),
    ({"activation_type": "tanh"},
     "activation_type 'tanh' has no counterpart in sparsekit; these have: swiglu, gelu, relu"),
    ({"bias_for_layer_norm": True},
     "layer_norm_type 'rms' with bias_for_layer_norm has no counterpart in sparsekit"),
    ({"peri_norm": True, "layer_norm_scaling": True},
     "peri_norm with layer_norm_scaling has no counterpart in sparsekit"),
    ({**KINDS["fork_moe"], "layer_norm_scaling": True},
     "layer_norm_scaling with block_type 'moe' has no counterpart in sparsekit"),
    ({"block_type": "moe", "moe_config": {**FORK, "moe_type": "moe"}},
     "moe_config.moe_type 'moe' has no counterpart in sparsekit"),
    ({"block_type": "moe", "moe_config": {**FORK, "normalize_expert_weights": 2.0}},
     "normalize_expert_weights 2.0 has no counterpart in sparsekit; 1 has"),
    ({"block_type": "moe", "moe_config": {**FORK, "foo": 1}}, "config key 'moe_config.foo' is not understood"),
    ({"attention_sink": 4},
     "config key 'attention_sink' is not understood; remove it if it does not change the function"),
    ({"n_layers": 2},
     "tensor transformer.blocks.2.attn_norm.weight has no counterpart in the model that its config describes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "told"), REFUSALS, ids=[told[:24] for _, told in REFUSALS])
def test_what_cannot_be_expressed_is_refused_by_name(changes, told, tmp_path):
    made = Checkpoint()
    made.c.update(changes)
    there = made.save(tmp_path / "step100")
    with pytest.raises(CheckpointError) as error:
        import_folder(str(there), tmp_path / "in")
    assert str(error.value) == f"hf:{there}: {told}"
    assert not (tmp_path / "in").exists()


def test_a_sharded_checkpoint_is_not_opened(tmp_path):
    there = Checkpoint().save(tmp_path / "step100")
    (there / "model.pt").rename(there / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"is sharded \(.distcp\), and opening those runs code; unshard it"):
        import_folder(str(there), tmp_path / "in")


def test_a_damaged_config(tmp_path):
    there = Checkpoint().save(tmp_path / "step100")
    (there / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"config.yaml: is damaged \(while parsing"):
        import_folder(str(there), tmp_path / "in")
    (there / "config.yaml").write_text("model: {n_layers: 2}")
    with pytest.raises(CheckpointError, match=r"config.yaml: describes no model \(it has no 'd_model'\)"):
        import_folder(str(there), tmp_path / "in")
