"""Probes while a model trains: on a side batch, at steps that the spec says, leaving training as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from sparsekit.data.dataset import OWN
from sparsekit.model.build import build_model
from sparsekit.probes import results
from sparsekit.probes.base import Tokens
from sparsekit.probes.runner import choose, run_probes, stem_of
from sparsekit.probes.targets import windows_of
from sparsekit.spec.run import ScheduledProbe
from sparsekit.training.callbacks import Callback

if TYPE_CHECKING:
    from sparsekit.training.trainer import Trainer

FOLDER = "probes"


class SideProbes(Callback):
    """Runs the spec's ``probes`` and writes ``probes/<probe>-step-<step>.json`` into the run's folder.

    They look at the training weights as they are kept (float32 under "bf16"), on windows of the validation text that
    stay the same for the whole run. Of several processes the first looks at a copy that all have put together.
    """

    def __init__(self, plans: Sequence[ScheduledProbe]):
        super().__init__(None)
        self.plans = plans

    def on_step(self, trainer: Trainer) -> None:
        step, last = trainer.progress.step, trainer.progress.step == trainer.total_steps
        due = [plan for plan in self.plans if (last if plan.every == "end" else step % plan.every == 0)]
        if not due:
            return
        model = _whole(trainer) if trainer.world.size > 1 else trainer.model
        trainer.world.from_main(lambda: self._measure(trainer, model, due, last))

    def _measure(self, trainer: Trainer, model: nn.Module | None, due: list[ScheduledProbe], last: bool) -> None:
        assert model is not None, "the first process has it"
        settings, step = trainer.spec.train, trainer.progress.step
        probes = choose([plan.probe for plan in due])
        for sequences in sorted({plan.sequences for plan in due}):
            alike = {
                name: probe
                for (name, probe), plan in zip(probes.items(), due, strict=True)
                if plan.sequences == sequences
            }
            ids, _ = windows_of(trainer.data.validation[OWN], sequences, trainer.spec.seq_len, settings.seed)
            tokens = Tokens.of(ids, settings.micro_batch_size)
            for name, result in run_probes(model, alike, tokens, seed=settings.seed).items():
                result.meta |= {"target": str(trainer.run.folder), "step": step}
                results.save(result, trainer.run.folder / FOLDER, stem_of(name, step), plots=last)


def _whole(trainer: Trainer) -> nn.Module | None:
    """The model in one piece on the first process, gathered from all; None on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not trainer.is_main:
        return None
    dtype = next(trainer.model.parameters()).dtype
    model = build_model(trainer.spec.model, dtype=dtype)
    model.load_state_dict(weights)
    return model.to(trainer.device)
