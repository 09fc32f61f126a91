"""benchmarks/reproduction: its protocol, what is packed, and what is written of what came out."""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reproduction import page, pool, protocol
from sparsekit.data.shards import MANIFEST, ShardWriter, open_shards, verify_shards
from sparsekit.errors import DataError
from sparsekit.files import write_json
from sparsekit.studies import stages, study
from sparsekit.studies.laws import RELU, SILU
from sparsekit.studies.plan import Plan, PlannedRun, expand
from sparsekit.studies.spec import load_study

TINY = ["base.model.d_model=16", "base.model.max_seq_len=32", "base.train.micro_batch_size=256", "seeds=[0, 1, 2]"]


@pytest.fixture
def text(monkeypatch) -> None:
    monkeypatch.setattr(protocol, "read_manifest", lambda folder: {"vocab_size": 257})


@pytest.fixture
def planned(tmp_path, text) -> Callable[..., Plan]:
    """A study under the protocol, cut down to what is planned at once."""

    def plan(name: str, *sets: str) -> Plan:
        path = protocol.SPECS / f"{name}_small.json"
        told = load_study(path, [*protocol.overrides(name, tmp_path), *TINY, *sets], tmp_path / "out" / name)
        return expand(told)

    return plan


def finished(plan: Plan, runs: Sequence[PlannedRun], scalar: Callable[[str, PlannedRun], float]) -> None:
    """As if these runs had come to their end, each probe with one scalar."""
    study.prepare(plan, plan.distinct)
    for run in runs:
        (run.folder / "probes").mkdir(parents=True)
        (run.folder / "checkpoints").mkdir()
        (run.folder / "checkpoints" / "model.safetensors").write_bytes(b"weights")
        (run.folder / "spec.json").write_text(json.dumps(run.resolved))
        row = {"step": 300, "tokens": run.tokens, "val_loss": 4.0, "tokens_per_second": 1e4}
        (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        for stage in stages.stages(plan):
            file = run.folder / "metrics.jsonl"
            if stage.kind == "probe":
                file = run.folder / "probes" / f"{stage.of}-step-00000300.json"
                name = {"usefulness": "mean_log_loss_ratio", "causal": "causal"}.get(stage.of.removesuffix("-2"), "x")
                result = {"scalars": {name: scalar(stage.of, run)}, "per_layer": {}, "matrices": {}, "arrays": {}}
                file.write_text(json.dumps({**result, "intervals": {}, "meta": {}}))
            stages.note_done(run.folder, stage, file, step=300, tokens=run.tokens)


def test_the_protocol_is_of_the_studies_that_are_shipped_and_the_page_has_a_place_for_each():
    assert {f"{name}_small" for name in protocol.STUDIES} == {path.stem for path in protocol.SPECS.glob("*_small.json")}
    told = page.PAGE.read_text(encoding="utf-8")
    parts = {name: f"of {name}" for name in ("verdicts", *protocol.STUDIES)}
    assert all(part in page.filled(told, parts) for part in parts.values())


@pytest.mark.parametrize("name", protocol.STUDIES)
def test_every_study_measures_the_same_and_with_the_released_code_too(name, tmp_path, text):
    told = load_study(protocol.SPECS / f"{name}_small.json", protocol.overrides(name, tmp_path)).spec
    probes = [{"type": probe} if isinstance(probe, str) else probe for probe in told.probes]
    assert {"variance", "usefulness", "causal", "permutation", "jacobian"} <= {probe["type"] for probe in probes}
    claimed = {claim.measure.partition("/")[0] for claim in told.claims} - {"val_perplexity"}
    assert claimed <= {probe["type"] for probe in probes}
    for measure in claimed & {"usefulness", "activation_sparsity"}:
        assert [probe.get("compat") for probe in probes if probe["type"] == measure] == [None, "released"]
    assert len(told.seeds) >= 3


def test_lengths_share_a_batch(planned):
    for run in planned("sequence_length", "base.model.max_seq_len=512").runs:
        train = run.resolved["train"]
        assert train["micro_batch_size"] * run.resolved["model"]["max_seq_len"] == train["global_batch_tokens"]


def test_the_first_seed_of_every_variant_is_first(planned):
    plans = {name: planned(name) for name in ("depth", "gqa_group")}
    order = pool.in_order(plans)
    assert [run.seed for _, run in order] == [0] * 8 + [1] * 8 + [2] * 8
    assert order[0][1].labels == {"n_layers": "32"}
    first = order[0][1]
    finished(plans["depth"], [first], lambda *_: 1.0)
    assert first.folder not in {run.folder for _, run in pool.in_order(plans)}


def test_what_is_packed_is_what_ended_without_checkpoints_and_comes_back(planned, tmp_path):
    plan = planned("gqa_group")
    finished(plan, plan.runs[:2], lambda *_: 1.0)
    (plan.runs[2].folder).mkdir()
    (plan.runs[2].folder / "spec.json").write_text(json.dumps(plan.runs[2].resolved))  # begun, not ended
    pool.note(plan, {"minutes": 1.5})
    archive = pool.pack(tmp_path / "out", plan)
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert not any("checkpoints" in name or plan.runs[2].id in name for name in names)
    other = tmp_path / "other"
    other.mkdir()
    archive.rename(other / archive.name)
    folder = pool.unpack(other, "gqa_group")
    assert folder is not None and pool.minutes_of(folder) == 1.5
    again = expand(load_study(folder))
    assert [pool.status(again, run) for run in again.runs[:4]] == ["done", "done", "to run", "to run"]
    assert pool.unpack(other, "depth") is None


def test_a_part_that_the_page_has_no_place_for_is_refused():
    with pytest.raises(ValueError, match=r"no one place <!-- begin b -->"):
        page.filled("<!-- begin a --><!-- end a -->", {"b": "text"})
    assert page.filled("x <!-- begin a -->old<!-- end a --> y", {"a": "n"}) == "x <!-- begin a -->\nn\n<!-- end a --> y"


@pytest.fixture
def copy(tmp_path) -> Path:
    target = tmp_path / "page.md"
    target.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return target


def test_a_folder_without_studies_is_refused_and_nothing_written(copy, tmp_path):
    before = copy.read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"nothing: holds no study with one seed to its end; run one first"):
        page.write(tmp_path / "nothing", copy, tmp_path / "figures")
    assert copy.read_text(encoding="utf-8") == before and not (tmp_path / "figures").exists()


def test_verdicts_are_of_the_seeds_that_every_variant_has(planned, copy, tmp_path, capsys):
    """Causal effects fall with depth in every seed; affine losses do not move, but do with the released code."""
    plan = planned("depth", "axes.model.n_layers=[2, 3]")
    first, last = plan.runs[:3], plan.runs[3:]

    def scalar(label: str, run: PlannedRun) -> float:
        sign = 1 if run.seed % 2 else -1
        deep = run.labels["n_layers"] == "3"
        near = -0.5 - 0.001 * run.seed
        moves = {"causal": near, "usefulness": 0.01 * sign, "usefulness-2": near}.get(label, 0.0)
        return 1.0 + 0.001 * run.seed + deep * (moves if run.seed != 2 else 99.0)

    finished(plan, [*first, *last[:2]], scalar)  # the third seed of the deeper one is missing
    pool.note(plan, {"minutes": 2.0, "device": "a GPU", "torch": "2", "commit": "abc"})
    page.write(tmp_path / "out", copy, tmp_path / "figures")
    told = copy.read_text(encoding="utf-8")
    assert "5 of 6 runs done; 2 seeds that every variant has, of 3 planned; 2.0 minutes" in told
    lines = {cell: line for line in told.splitlines() for cell in line.split(" | ")[:1] if line.startswith("| ")}
    causal = lines["| A layer's removal matters less to later layers in a deeper model"]
    assert "-0.5 [-0.507, -0.494] | **holds** |" in causal and "12: 0.355" in causal
    affine = lines["| What the affine map of a layer loses, on the mean over layers, falls with depth"]
    assert "**cannot be told** | **holds**, -0.5" in affine
    assert "With the released code's measures 1 of 1 verdicts are others:\n* depth: What the affine map" in told
    with (tmp_path / "figures" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done"] * 5 + ["to run"]
    assert rows[2]["causal/causal"] == "1.002"
    assert told.count("| not run |") == told.count("Not run") == len(protocol.STUDIES) - 1
    before = page.PAGE.read_bytes()
    page.write(tmp_path / "out")  # not told where, beside the studies
    assert "](figures/depth-0.svg)" in (tmp_path / "out" / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "figures" / "runs.csv").exists() and page.PAGE.read_bytes() == before
    assert "depth: " in capsys.readouterr().out and (tmp_path / "out" / "depth" / "report.html").exists()


def test_laws_take_points_between_warm_up_and_decay_that_are_not_saturated(planned):
    run = next(run for run in planned("activation").runs if run.labels["max_steps"] == "1000")
    (run.folder / "probes").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 1000, "tokens": 1000 * 8192}) + "\n")
    for step in range(25, 1001, 25):
        told = {"scalars": {"activation_ratio": step / 1000}, "meta": {"status": "saturated" if step == 100 else "ok"}}
        (run.folder / "probes" / f"activation_sparsity-step-{step:08d}.json").write_text(json.dumps(told))
    points = page.stable_points(run)
    assert [round(a * 1000) for _, a in points] == [step for step in range(50, 901, 25) if step != 100]
    assert points[0][0] == pytest.approx(50 * 8192 / 1e9)


def test_a_law_recovers_its_coefficients_or_says_why_not():
    points = [(d / 100, 0.4 - 0.02 * (d / 100) ** -0.5) for d in range(1, 12)]
    assert "c 0.02 [" in page.law_line(SILU, "seed 0", points)
    assert "measure more checkpoints" in page.law_line(SILU, "seed 0", points[:3])
    assert "there are 0" in page.law_line(RELU, "seed 0", [])


def test_pieces_are_those_of_the_text_in_another_order(tmp_path):
    """Every piece of 16 tokens is one of the text's, none twice, ends of text where they were; validation as it is."""
    rng = np.random.default_rng(0)
    ends, text, pieces = 0, tmp_path / "text", tmp_path / "pieces"
    text.mkdir()
    splits = {}
    for split, n in (("train", 40), ("validation", 3)):
        writer = ShardWriter(text, split, "npy", np.dtype("uint16"), ends, 700)  # several shards
        for _ in range(n):
            writer.add(rng.integers(1, 300, rng.integers(1, 90)).astype(np.uint16).tobytes(), 100)
        writer.close()
        splits[split] = writer.totals()
    told = {"format": 1, "layout": "npy", "dtype": "uint16", "vocab_size": 300, "eos_id": ends, "splits": splits}
    write_json(text / MANIFEST, told)
    protocol.in_pieces(text, pieces, 16, seed=1)
    verify_shards(pieces)
    with pytest.raises(DataError, match="pieces: is there already"):
        protocol.in_pieces(text, pieces, 16, seed=1)
    before, after = (np.concatenate([shard.tokens for shard in open_shards(f, "train").shards]) for f in (text, pieces))
    whole = len(before) // 16 * 16
    cut, shuffled = (tokens[:whole].reshape(-1, 16).tolist() for tokens in (before, after))
    assert sorted(cut) == sorted(shuffled) and cut != shuffled
    assert len(after) - whole in (0, 1) and after[-1] == ends
    held = [open_shards(folder, "validation").fingerprint for folder in (text, pieces)]
    assert held[0] == held[1]


@pytest.mark.slow
def test_from_a_text_to_the_page(copy, tmp_path, capsys):
    """All three verbs, for real: a study stopped before it begins, gone on with, packed, and written elsewhere."""
    for name, n in (("train", 3000), ("validation", 1500)):
        words = (f"{('small', 'large')[i % 2]} models of {i % 7} layers read {i % 11} lines." for i in range(n))
        (tmp_path / f"{name}.txt").write_text("\n\x1e\n".join(words))
    text, out, other = (tmp_path / name for name in ("text", "out", "other"))
    protocol.prepare(tmp_path / "train.txt", tmp_path / "validation.txt", text, 100_000, 300, "\x1e")
    sets = [*TINY, "base.train.max_steps=3", "base.train.global_batch_tokens=8192", "base.model.n_layers=2"]
    sets += ['axes.group={"1": {"model.block.attention.n_kv_heads": 8}, "4": {"model.block.attention.n_kv_heads": 2}}']
    sets += ["base.train.precision=fp32", "base.train.eval_tokens=2048", "seeds=[0, 1]"]
    pool.run(text, out, ["gqa_group"], 2, 0.0, sets)
    assert "0 of 4 runs done" in capsys.readouterr().out
    pool.run(text, out, ["gqa_group"], 2, 10.0, sets)
    assert "4 of 4 runs done" in capsys.readouterr().out
    other.mkdir()
    (out / "gqa_group.tar.xz").rename(other / "gqa_group.tar.xz")
    page.write(other, copy, tmp_path / "figures")
    told = copy.read_text(encoding="utf-8")
    assert "4 of 4 runs done; 2 seeds that every variant has, of 2 planned" in told
    assert "| gqa_group | Sharing keys and values damps the last layer's variance | **" in told
    assert "](figures/gqa_group-0.svg)" in told and (other / "gqa_group" / "report.html").exists()
