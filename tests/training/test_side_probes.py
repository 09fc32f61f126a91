"""Probes in training: when they run, where they write, and that training is none the wiser."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finished

from sparsekit.errors import SpecError
from sparsekit.model.targets import Run, load_model
from sparsekit.probes import results
from sparsekit.probes.runner import probe
from sparsekit.spec.load import dump, fingerprint, validate
from sparsekit.training.run import train

PROBES = [{"type": "variance", "every": 5}, {"type": "similarity", "sample": 40, "sequences": 3}]


def trained(raw: dict[str, Any], folder: Path, **changes: Any) -> Run:
    raw = copy.deepcopy(raw) | changes
    raw["model"]["layers"]["1"]["ffn"]["router"] = {"type": "top_k", "k": 2, "jitter": 0.1}  # draws random numbers
    raw["train"]["statistics"] = {"every": 4}
    return train(validate(raw), out=folder)


def test_training_with_probes_ends_bit_for_bit_as_without(raw: dict[str, Any], tmp_path: Path) -> None:
    plain, probed = trained(raw, tmp_path / "plain"), trained(raw, tmp_path / "probed", probes=PROBES)
    ours, theirs = (load_model(run).state_dict() for run in (probed, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mine, other in zip(probed.metrics, plain.metrics, strict=True):
        assert {k: v for k, v in mine.items() if not _is_timing(k)} == {
            k: v for k, v in other.items() if not _is_timing(k)
        }


def _is_timing(name: str) -> bool:
    return any(word in name for word in ("second", "tokens_per", "mfu", "memory", "wait"))


def test_results_stand_in_the_runs_folder_and_are_those_of_the_checkpoint(raw: dict[str, Any], tmp_path: Path) -> None:
    run = trained(raw, tmp_path / "run", probes=PROBES)
    found = sorted(path.name for path in (run.folder / "probes").glob("*.json"))
    assert found == [
        "similarity-step-00000012.json", "variance-step-00000005.json", "variance-step-00000010.json",
    ]  # fmt: skip
    told = results.load(run.folder / "probes" / "similarity-step-00000012.json")
    assert (told.meta["step"], told.meta["sequences"], told.meta["params"]["sample"]) == (12, 3, 40)
    assert (run.folder / "probes" / "similarity-step-00000012.png").exists()
    again = probe(run, {"type": "similarity", "sample": 40}, sequences=3, seed=raw["train"].get("seed", 0))[
        "similarity"
    ]
    assert again.meta["data_fingerprint"] == told.meta["data_fingerprint"]
    assert again.scalars == pytest.approx(told.scalars, rel=1e-6)


def test_the_side_batch_stays_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    run = trained(raw, tmp_path / "run", probes=PROBES)
    first, second = (results.load(run.folder / "probes" / f"variance-step-{n:08d}.json") for n in (5, 10))
    assert first.meta["data_fingerprint"] == second.meta["data_fingerprint"]
    assert first.scalars != second.scalars


def test_a_spec_with_probes_reads_back_as_it_was_written(raw: dict[str, Any]) -> None:
    spec = validate(raw | {"probes": [*PROBES, "moments"]})
    again = validate(dump(spec))
    assert dump(again) == dump(spec)
    assert fingerprint(again) == fingerprint(spec)
    plan = spec.probes[0]
    assert (plan.probe.type, plan.every, plan.sequences) == ("variance", 5, 16)
    assert dump(spec)["probes"][2]["every"] == "end"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"type": "varience", "every": 5}, "probes.0.probe: unknown probe 'varience' (did you mean 'variance'?)"),
        ({"type": "variance", "every": 0}, "probes.0.every: expected a number of steps or 'end', got 0"),
        ({"every": 5}, "probes.0.probe: expected the name of a registered probe"),
    ],
)
def test_mistakes_are_told_with_their_path(raw: dict[str, Any], given: Any, told: str) -> None:
    with pytest.raises(SpecError) as error:
        validate(raw | {"probes": [given]})
    assert str(error.value).startswith(told)


def test_several_processes_probe_the_model_that_they_hold_together(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"max_steps": 3, "global_batch_tokens": 128}
    run = Run(tmp_path / "two")
    finished(raw | {"probes": PROBES}, run.folder, 2)
    told = results.load(run.folder / "probes" / "similarity-step-00000003.json")
    again = probe(run, {"type": "similarity", "sample": 40}, sequences=3)["similarity"]
    assert again.meta["data_fingerprint"] == told.meta["data_fingerprint"]
    assert again.scalars == pytest.approx(told.scalars, rel=1e-6)
    assert len(run.metrics) == 3
