"""A callback for sparsekit, which looks on while a model trains; in a spec ``"callbacks": [..., "new_part"]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat
from sparsekit.files import read_object, write_json
from sparsekit.training.callbacks import Callback

if TYPE_CHECKING:
    from sparsekit.training.trainer import Trainer


class NewPart(Callback):
    """When the training loss first came down to ``loss``: step, tokens and that loss, in new_part.json of the run.

    Losses are looked at as they are logged, every ``train.log_every`` steps; there is no file while none was as low.
    """

    class Params(Callback.Params):
        loss: PositiveFloat = 3.0

    def on_start(self, trainer: Trainer) -> None:
        self._path = trainer.run.folder / "new_part.json"
        # a resumed run takes the steps after its checkpoint again
        self._done = self._path.exists() and read_object(self._path)["step"] <= trainer.progress.step
        if trainer.is_main and not self._done:
            self._path.unlink(missing_ok=True)

    def on_log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self._done or row["loss"] > self.params.loss:
            return
        self._done = True
        if trainer.is_main:  # every process of a run comes here
            write_json(self._path, {name: row[name] for name in ("step", "tokens", "loss")})
