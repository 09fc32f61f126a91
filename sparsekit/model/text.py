"""Text from a model: what tokens spell, as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sparsekit.model.decoder import Decoder
from sparsekit.model.generate import generate_batch
from sparsekit.model.sampling import Sampling


class Tokenizer(Protocol):
    """What is needed of one."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: Any) -> str: ...


class TextStream:
    """The text of tokens that come one by one, given out as soon as no later token can change it.

    Half a character waits for its rest, and what may turn out to begin a stop string for what follows.

    Attributes:
        text: all that was given out.
        stopped: a stop string came; it and what follows are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop, self._ids = tokenizer, [s for s in stop if s], list[int]()
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain and was not before."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        return self._give(text.rstrip("\ufffd"), hold=True)

    def close(self) -> str:
        """What was held back, once no more tokens come."""
        return self._give(self._tokenizer.decode(self._ids), hold=False)

    def _give(self, text: str, hold: bool) -> str:
        if self.stopped:
            return ""
        # the one that is complete first, whatever characters come together in a token
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if found:
            self.stopped, text = True, text[: min(found)[1]]
        elif hold:
            text = text[: len(text) - max((_begun(text, s) for s in self._stop), default=0)]
        new = text[len(self.text) :]
        self.text += new
        return new


def _begun(text: str, stop: str) -> int:
    """How many characters at the text's end are the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int | None = None,
    compile: bool = False,
    on_text: Callable[[int, str], None] = lambda index, text: None,
) -> list[str]:
    """What the model writes after each prompt, up to a stop string (left out) or the end of a document.

    A prompt is a text, of which an empty one stands for the beginning of a document, or its token ids. Otherwise as
    :func:`~sparsekit.model.generate.generate_batch`.

    Args:
        on_text: called with (index of the prompt, text) for each piece of text as it comes.

    Raises:
        ValueError: a number outside its range.
    """
    streams = [TextStream(tokenizer, stop) for _ in prompts]

    def ends(index: int, token: int) -> bool:
        if token == tokenizer.eos_id:
            return True
        new = streams[index].push(token)
        if new:
            on_text(index, new)
        return streams[index].stopped

    encoded = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    ids = [[int(i) for i in each] or [tokenizer.eos_id] for each in encoded]
    sampling = Sampling(temperature, top_k, top_p, min_p)
    for _ in generate_batch(
        model, ids, max_new_tokens, sampling=sampling, seed=seed, ends=ends, batch_size=batch_size, compile=compile
    ):
        pass  # a token at a time: ends() has it
    for index, stream in enumerate(streams):
        rest = stream.close()
        if rest:
            on_text(index, rest)
    return [stream.text for stream in streams]
