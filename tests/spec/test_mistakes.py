"""What a user can get wrong in a spec, and the line it is told in: path, what, and the mend."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from sparsekit.components.contracts import FeedForward, Norm, Residual
from sparsekit.errors import SpecError
from sparsekit.registry import registry
from sparsekit.spec import Choice, Params, Slot, pick
from sparsekit.spec.load import load_spec, validate_model


def put(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a spec with one value replaced."""
    made = copy.deepcopy(raw)
    here: Any = made
    *parents, last = path.split(".")
    for part in parents:
        here = here.setdefault(part, {}) if isinstance(here, dict) else here[int(part)]
    here[last] = value
    return made


def without(raw: dict[str, Any], path: str) -> dict[str, Any]:
    made = copy.deepcopy(raw)
    here: Any = made
    *parents, last = path.split(".")
    for part in parents:
        here = here[part]
    del here[last]
    return made


MOE = {"type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 8}}
NO_SLOT = (
    "model.block.attention: expected the name of a registered attention, or an object with its 'type'; registered: …"
)
BAD_SELECTORS = ("x", "", "1.5", "0:1:2:3", "::0", "0,1")
SELECTOR = "expected a layer such as '0' or '-1', or a slice such as '4:12:2'"

# what is registered and which keys there are may grow, so a line that ends in … may go on
ONE_MISTAKE = [
    # names
    (
        "model.block.attention.type",
        "gpa",
        "model.block.attention: unknown attention 'gpa' (did you mean 'gqa'?); registered: …",
    ),
    (
        "model.block.attention",
        "mhaa",
        "model.block.attention: unknown attention 'mhaa' (did you mean 'mha'?); registered: …",
    ),
    ("model.block.attention", "{x} %s", "model.block.attention: unknown attention '{x} %s'; registered: …"),
    (
        "model.block.norm",
        {"type": "rms_norm"},
        "model.block.norm: unknown norm 'rms_norm' (did you mean 'rmsnorm'?); registered: …",
    ),
    (
        "model.block.ffn",
        {**MOE, "expert": {**MOE, "expert": {"type": "mlp", "d_ff": 8, "activation": "rleu"}}},
        "model.block.ffn.expert.expert.activation: unknown activation 'rleu' (did you mean 'relu'?); registered: …",
    ),
    # no slot at all
    ("model.block.attention", None, NO_SLOT),
    ("model.block.attention", ["gqa"], NO_SLOT),
    ("model.block.attention", {"n_heads": 4}, NO_SLOT),
    ("model.block.attention.type", 3, NO_SLOT),
    # keys
    ("modle", 1, "spec: unknown key 'modle' (did you mean 'model'?); keys: …"),
    ("model.block.atention", "mha", "model.block: unknown key 'atention' (did you mean 'attention'?); keys: …"),
    ("model.block.ffn.d_f", 3, "model.block.ffn: unknown key 'd_f' (did you mean 'd_ff'?); keys: …"),
    ("model.block.norm", {"epz": 0.1}, "model.block.norm: unknown key 'epz' (did you mean 'eps'?); keys: …"),
    (
        "model.block.ffn",
        {**MOE, "router": {"type": "top_k", "k": 1, "z": 1}},
        "model.block.ffn.router: unknown key 'z'; keys: …",
    ),
    ("model.block.attention.typ", "gqa", "model.block.attention: unknown key 'typ' (did you mean 'type'?); keys: …"),
    ("allow_leak", False, "spec: unknown key 'allow_leak' (did you mean 'model.allow_leak'?); keys: …"),
    ("max_steps", 3, "spec: unknown key 'max_steps' (did you mean 'train.max_steps'?); keys: …"),
    (
        "train.checkpoint_every",
        0,
        "train.checkpoint_every: expected a number of steps, 'auto' or null, got 0",
    ),
    ("train.keep", {"lst": 2}, "train.keep: unknown key 'lst' (did you mean 'last'?); keys: …"),
    # values
    ("model.d_model", "32", 'model.d_model: expected a valid integer, got "32"'),
    ("model.d_model", 32.0, "model.d_model: expected a valid integer, got 32.0"),
    ("model.d_model", True, "model.d_model: expected a valid integer, got true"),
    ("model.d_model", 0, "model.d_model: expected greater than 0, got 0"),
    ("model.d_model", None, "model.d_model: expected a valid integer, got null"),
    ("model.tie_embeddings", 1, "model.tie_embeddings: expected a valid boolean, got 1"),
    (
        "model.block.norm",
        {"type": "rmsnorm", "eps": float("nan")},
        "model.block.norm.eps: expected a finite number, got NaN",
    ),
    ("model.block.norm", {"eps": float("inf")}, "model.block.norm.eps: expected a finite number, got Infinity"),
    ("model.block.norm", {"eps": -1}, "model.block.norm.eps: expected greater than 0, got -1"),
    (
        "model.block.ffn",
        {**MOE, "dispatch": "fast"},
        "model.block.ffn.dispatch: expected 'grouped' or 'loop', got \"fast\"",
    ),
    ("model", [], "model: expected a valid dictionary or instance of ModelSpec, got []"),
    ("model.layers", {"0": 3}, "model.layers.0: expected a valid dictionary, got 3"),
    # sizes that do not fit together
    ("model.block.attention.n_kv_heads", 3, "model.block.attention: n_heads (4) is not divisible by n_kv_heads (3)"),
    (
        "model.block.attention",
        {"type": "mha", "n_heads": 5},
        "model.block.attention: d_model (32) is not divisible by n_heads (5); change n_heads, or give head_dim",
    ),
    (
        "model.block.attention.head_dim",
        5,
        "model.block.attention.position: rope turns pairs of channels, …",
    ),
    (
        "model.block.ffn",
        {**MOE, "router": {"type": "top_k", "k": 5}},
        "model.block.ffn.router: k (5) is above n_experts (4)",
    ),
    (
        "model.block.ffn",
        {**MOE, "expert": {**MOE, "router": {"type": "top_k", "k": 5}}},
        "model.block.ffn.expert.router: k (5) is above n_experts (4)",
    ),
    (
        "model.layers",
        {"1": {"attention": {"n_kv_heads": 3}}},
        "model.layers.1.attention: n_heads (4) is not divisible by n_kv_heads (3)",
    ),
    ("data.seq_len", 64, "data.seq_len: 64 is longer than model.max_seq_len, 32"),
    (
        "train",
        {"max_steps": 1, "max_tokens": 2},
        "train.max_tokens: give one of max_steps, max_tokens, max_epochs, not max_steps and max_tokens",
    ),
    (
        "train.global_batch_tokens",
        257,
        "train.global_batch_tokens: 257 is not a multiple of a micro-batch's 256 tokens "
        "(train.micro_batch_size 8 x seq_len 32)",
    ),
    # which layer is which
    ("model.pattern", ["a"], "model.pattern: a pattern needs 'blocks', which names what it repeats"),
    ("model.layers", {"4": {"norm": "none"}}, "model.layers.4: there is no layer 4 among 4"),
    ("model.layers", {"-5": {"norm": "none"}}, "model.layers.-5: there is no layer -5 among 4"),
    *[("model.layers", {bad: {"norm": "none"}}, f"model.layers.{bad}: {SELECTOR}") for bad in BAD_SELECTORS],
    ("model.layers", {"0": {"nrom": "none"}}, "model.layers.0: unknown key 'nrom' (did you mean 'norm'?); keys: …"),
    (
        "model.layers",
        {"0": {"norm": "nonne"}},
        "model.layers.0.norm: unknown norm 'nonne' (did you mean 'none'?); registered: …",
    ),
    (
        "model.layers",
        {"0": {"attention": {"n_heads": "4"}}},
        'model.layers.0.attention.n_heads: expected a valid integer, got "4"',
    ),
    # lists of slots
    (
        "train.callbacks",
        ["progress", {"type": "sample", "temprature": 1.0}],
        "train.callbacks.1: unknown key 'temprature' (did you mean 'temperature'?); keys: …",
    ),
]


@pytest.mark.parametrize(("path", "value", "line"), ONE_MISTAKE, ids=[line[:70] for _, _, line in ONE_MISTAKE])
def test_one_mistake_is_one_line(raw, problems, path, value, line):
    (told,) = problems(put(raw, path, value))
    assert told == line or (line.endswith("…") and told.startswith(line[:-1]))


@pytest.mark.parametrize("key", ["d_model", "n_layers", "vocab_size", "max_seq_len", "block.attention", "block.ffn"])
def test_what_is_required(raw, problems, key):
    assert f"model.{key}: required" in problems(without(raw, f"model.{key}"))


def test_required_parameters_of_what_fills_a_slot(raw, problems):
    lines = problems(put(raw, "model.block.attention", "gqa"))
    assert lines == ["model.block.attention.n_heads: required", "model.block.attention.n_kv_heads: required"]


def test_several_mistakes_at_once(raw, problems):
    for path, value in (
        ("model.d_model", "x"),
        ("model.block.attention", "gpa"),
        ("model.block.ffn.d_f", 3),
        ("train.max_steps", -1),
        ("train.optimizer", "adamx"),
    ):
        raw = put(raw, path, value)
    lines = problems(raw)
    paths = ["model.d_model", "model.block.attention", "model.block.ffn", "train.max_steps", "train.optimizer"]
    assert [line.split(": ")[0] for line in lines] == paths


def test_several_misfits_at_once(raw, problems):
    raw = put(raw, "model.block.attention.n_kv_heads", 3)
    raw = put(raw, "model.block.ffn", {**MOE, "router": {"type": "top_k", "k": 9}})
    raw = put(raw, "model.layers", {"-1": {"attention": {"n_kv_heads": 2, "head_dim": 3}}})
    assert problems(raw) == [
        "model.block.attention: n_heads (4) is not divisible by n_kv_heads (3)",
        "model.block.ffn.router: k (9) is above n_experts (4)",
        "model.layers.-1.attention.position: rope turns pairs of channels, but 3 of head_dim 3 are to turn; "
        "make that number even",
    ]


def test_a_mistake_that_many_layers_share_is_told_once(raw, problems):
    raw = put(raw, "model.block.attention.n_kv_heads", 3)
    raw = put(raw, "model.layers", {"0": {"norm": "none"}, "2:": {"norm": "layernorm"}})
    assert problems(raw) == ["model.block.attention: n_heads (4) is not divisible by n_kv_heads (3)"]


def test_block_or_blocks(raw, problems, tiny):
    block = raw["model"]["block"]
    line = "model.block: give either 'block' (one for every layer) or 'blocks' with a 'pattern'"
    assert problems(put(raw, "model.blocks", {"a": block})) == [line]
    bare = without(raw, "model.block")
    assert problems(bare) == [line]
    two = put(bare, "model.blocks", {"a": block, "b": copy.deepcopy(block)})
    assert problems(two) == ["model.pattern: required: which of a, b comes in which layer"]
    assert problems(put(two, "model.pattern", ["a", "c", "d"])) == [
        "model.pattern.1: unknown block 'c'; blocks: a, b",
        "model.pattern.2: unknown block 'd'; blocks: a, b",
    ]
    assert problems(put(two, "model.pattern", ["a", "a"])) == [
        "model.blocks.b: no layer uses it; name it in 'pattern', or set it to null"
    ]
    wrong = put(two, "model.blocks.b.attention", {"type": "gqa", "n_heads": 4, "n_kv_heads": 3})
    assert problems(put(wrong, "model.pattern", ["a", "b"])) == [
        "model.blocks.b.attention: n_heads (4) is not divisible by n_kv_heads (3)"
    ]


def test_a_class_without_params_of_ours_cannot_fill_a_slot(raw, problems):
    @registry("ffn").register("foreign")
    class Foreign:
        """No Params."""

    try:
        (line,) = problems(put(raw, "model.block.ffn", "foreign"))
    finally:
        registry("ffn").unregister("foreign")
    assert line.startswith("model.block.ffn: ffn 'foreign' (")
    assert line.endswith("Foreign) has no Params that derive from sparsekit.Params")


def test_an_entry_registered_after_the_spec_was_defined_works(raw, problems):
    assert problems(put(raw, "model.block.ffn", "late"))[0].startswith("model.block.ffn: unknown ffn 'late'")

    @registry("ffn").register("late")
    class Late(FeedForward):
        """x."""

        class Params(FeedForward.Params):
            width: int = 3

        @classmethod
        def check(cls, params: Any, facts: Any) -> None:
            if params.width > facts.d_model:
                raise ValueError(f"width ({params.width}) is above d_model ({facts.d_model})")

    try:
        spec = load_spec(put(raw, "model.block.ffn", {"type": "late", "width": 4}))
        assert spec.model.block.ffn.params.width == 4
        assert spec.model.block.ffn.cls is Late
        assert load_spec(put(raw, "model.block.ffn", "late")).model.block.ffn.params.width == 3
        assert problems(put(raw, "model.block.ffn", {"type": "late", "width": 99})) == [
            "model.block.ffn: width (99) is above d_model (32)"
        ]
    finally:
        registry("ffn").unregister("late")


def test_specs_are_immutable(raw):
    spec = load_spec(raw)
    for holder, name in ((spec, "name"), (spec.model, "d_model"), (spec.model.block.norm.params, "eps")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(holder, name, 1)


def test_a_model_mistake_names_paths_below_the_model(tiny):
    with pytest.raises(SpecError) as caught:
        validate_model(tiny(attention="gpa"))
    assert str(caught.value).startswith("block.attention: unknown attention 'gpa'")


def test_a_slot_of_an_unknown_kind_is_a_mistake_at_definition():
    with pytest.raises(Exception, match="unknown kind 'attn'"):
        Slot("attn")


# --- a default's type may be left unsaid


class Holder(Params):
    norm: Annotated[Choice, Slot("norm")] = pick("layernorm", eps=0.5)
    other: Annotated[Choice, Slot("norm")] | None = None


def test_a_slot_without_a_type_changes_its_default():
    whole = Holder.model_validate({"norm": {"bias": False}})
    assert whole.norm.dump().items() >= {"type": "layernorm", "eps": 0.5, "bias": False}.items()
    assert Holder().norm.dump().items() >= {"type": "layernorm", "eps": 0.5, "bias": True}.items()
    assert Holder(norm="layernorm").norm.params.eps == 1e-5, "a name alone means the entry's own defaults"
    assert Holder(norm={"type": "rmsnorm"}).norm.type == "rmsnorm"


def test_without_a_default_the_type_must_be_said():
    with pytest.raises(ValidationError, match="an object with its 'type'"):
        Holder.model_validate({"other": {"eps": 0.1}})


def test_rope_theta_without_a_type(raw):
    spec = load_spec(put(raw, "model.block.attention.position", {"theta": 5e5}))
    assert spec.model.block.attention.params.position.dump().items() >= {"type": "rope", "theta": 5e5}.items()


def test_choices_compare_and_hash_by_content():
    one, same = (
        Slot("norm").validate({"type": "rmsnorm", "eps": 0.5}),
        Slot("norm").validate({"type": "rmsnorm", "eps": 0.5}),
    )
    other = Slot("norm").validate("rmsnorm")
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2
    assert Slot("norm").validate(one) is one


def test_checks_are_told_what_the_parts_will_be_built_with(raw, problems):
    """A residual scheme builds the block's norms; a head layout tells its query-key norm its width."""

    @registry("residual").register("told")
    class Told(Residual):
        """Says what it is told."""

        @classmethod
        def check(cls, params: Any, facts: Any) -> None:
            raise ValueError(f"{facts['norm'].type} in layer {facts.layer_index} of {facts.n_layers}")

    @registry("norm").register("told")
    class Width(Norm):
        """Says what it is told."""

        @classmethod
        def check(cls, params: Any, facts: Any) -> None:
            raise ValueError(f"{facts.get('width', facts.d_model)} wide")

    try:
        lines = problems(put(raw, "model.layers", {"2": {"residual": "told", "norm": "layernorm"}}))
        assert lines == ["model.layers.2.residual: layernorm in layer 2 of 4"]
        lines = problems(put(put(raw, "model.block.attention.qk_norm", "told"), "model.final_norm", "told"))
        assert lines == ["model.final_norm: 32 wide", "model.block.attention.qk_norm: 8 wide"]
    finally:
        registry("residual").unregister("told")
        registry("norm").unregister("told")
