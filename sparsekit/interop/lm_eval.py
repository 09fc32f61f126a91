"""lm-eval (EleutherAI's evaluation harness) on sparsekit's models: the model type ``sparsekit``, and ``evaluate``.

Importing this module registers the type, after which lm-eval itself knows ``--model sparsekit --model_args target=…``.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from sparsekit.data.dataset import load_tokenizer
from sparsekit.errors import CheckpointError, DataError, SparsekitError, UnknownNameError, did_you_mean
from sparsekit.files import writable, write_json
from sparsekit.model.decoder import Decoder
from sparsekit.model.likelihood import AUTO_TOKENS, loglikelihoods
from sparsekit.model.targets import CHECKPOINTS, Run, Target, dtype_of, load_model, resolve
from sparsekit.model.text import Tokenizer, generate_text
from sparsekit.spec.load import HUGGING_FACE

BOOTSTRAP = 1000  # lm-eval's 100000 take longer than the model for the few metrics that need any


@register_model("sparsekit")
class SparsekitLM(TemplateLM):
    """A sparsekit model as lm-eval sees it.

    The token that ends a document also begins one: it stands before an empty context and before a text whose whole
    likelihood is asked for (``rolling``); before other contexts only if ``add_bos``.

    Args:
        target: a spec, a run folder or a checkpoint folder; or a model in memory, with its ``tokenizer``.
        batch_size: sequences at a time, or "auto".
        seed: of generation, where a task samples.
    """

    def __init__(
        self,
        target: str | Path | Run | Target | Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = "cpu",
        dtype: str | torch.dtype = "float32",
        add_bos: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if isinstance(target, Decoder):
            if tokenizer is None:
                raise DataError("a model in memory needs its tokenizer to be evaluated on text")
            self.model, self._own = target.eval(), tokenizer
        else:
            resolved = target if isinstance(target, Target) else resolve(target, weights=True)
            self._own = tokenizer or _tokenizer(resolved)
            self.model = load_model(resolved, device=device or "cpu", dtype=dtype_of(dtype))
        self.batch_size = _batch_size(batch_size)
        self.add_bos, self.seed = add_bos, seed
        self._device = next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self._own.eos_id

    @property
    def max_length(self) -> int:
        return self.model.spec.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self._own, "fingerprint", type(self._own).__name__))

    @property
    def bos_policy(self) -> str:
        """What stands before a text, in words."""
        where = "every context and text" if self.add_bos else "empty contexts and rolling texts"
        return f"token {self.eot_token_id}, which ends documents, before {where}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to its own record."""
        parameters = sum(p.numel() for p in self.model.parameters())
        dtype = str(next(self.model.parameters()).dtype)
        return {"model_num_parameters": parameters, "model_dtype": dtype, "bos_policy": self.bos_policy}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; ``add_special_tokens`` None leaves the token before it to ``add_bos``."""
        begun = self.add_bos if add_special_tokens is None else add_special_tokens
        return [*([self.eot_token_id] if begun else []), *map(int, self._own.encode(string))]

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        """The text of ids."""
        return self._own.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm) as bar:
            try:
                results = loglikelihoods(self.model, pairs, self.batch_size, bar.update)
            except ValueError as error:
                raise DataError(f"{error}; choose another task") from None
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts: windows of ``max_length`` that predict each token once, the last with a full context."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], False)
            for context, continuation in rolling_windows(ids, self.prefix_token_id, self.max_length):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context up to its stop strings, greedily unless the task samples.

        A context is cut from its left to leave room for ``max_gen_toks``; where that is not less than the model's
        longest sequence, to half of it, and the model goes on as :func:`sparsekit.generate` does.
        """
        grouped: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            grouped.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generation", disable=disable_tqdm)
        for indices in grouped.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks))
            n_new = options["max_gen_toks"]
            room = self.max_length - n_new if n_new < self.max_length else max(self.max_length // 2, 1)
            temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
            done = generate_text(
                self.model, self._own, [self.tok_encode(requests[i].args[0])[-room:] for i in indices], n_new,
                temperature=temperature, top_k=options.get("top_k") or None,
                top_p=options.get("top_p"), min_p=options.get("min_p"), seed=self.seed,
                stop=handle_stop_sequences(options.get("until"), None), batch_size=self.batch_size or 16,
            )  # fmt: skip
            for i, text in zip(indices, done, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            bar.update(len(indices))
        bar.close()
        return texts


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) of windows that predict each token once.

    The first window is the prefix and ``length`` tokens, the others ``length`` tokens after one more of context; the
    last reaches back as far as ``length`` allows.
    """
    windows = lm_eval_utils.get_rolling_token_windows(list(ids), prefix, length, 1)
    yield from map(lm_eval_utils.make_disjoint_window, windows)


# --- the whole of an evaluation


def evaluate(
    target: Any,
    tasks: Sequence[str] | str,
    *,
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    add_bos: bool = False,
    seed: int = 1234,
    output: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    log_samples: bool = False,
    within: Callable[[Any], AbstractContextManager[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Runs lm-eval's tasks on a model and writes down what came out and how.

    Args:
        target: a spec (fresh weights), a run or checkpoint folder, ``hf:PATH_OR_NAME`` (which lm-eval's own ``hf``
            loads), or a model in memory with its ``tokenizer``.
        tasks: names of tasks, groups or tags: those in ``include_path`` first, then lm-eval's own.
        limit: examples a task, or a share of them if below 1.
        add_bos: begin every context with the token that begins a document.
        seed: of few-shot examples and of tasks that sample; the default is lm-eval's own.
        within: what the model is evaluated in, such as a sparsifier; what it says of itself, its ``name`` first, goes
            into the record as ``within``.
        output: a file for the record; by default ``eval/`` of the run's folder, nothing for what is in no folder.

    Returns:
        The record: ``results`` by task and metric as lm-eval names them, ``groups``, and how they came about.

    Raises:
        SparsekitError: no such task or target, or the record cannot be written.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = _manager(names, include_path)
    started = time.time()
    lm, place = _open(target, tokenizer, batch_size, device, dtype, add_bos, seed)
    try:
        with nullcontext({}) if within is None else within(lm.model) as around, _quiet():
            told = evaluator.simple_evaluate(
                model=lm, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit,
                bootstrap_iters=BOOTSTRAP, log_samples=log_samples, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
    except OSError as error:  # which datasets raises for what is neither on the disk nor to be reached
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"--tasks {','.join(names)}: their data cannot be read ({reason}); see --include-path"
        ) from None
    assert told is not None, "one process"
    ours = isinstance(lm, SparsekitLM)
    packages = ("sparsekit", "lm_eval", "torch", *(() if ours else ("transformers",)))
    auto = f"auto (up to {AUTO_TOKENS} tokens)" if ours else "auto"
    record: dict[str, Any] = {
        "target": _name(target),
        "checkpoint": None if place is None else str(place),
        "results": _plain(told["results"]),
        "groups": _plain(told.get("groups") or {}),
        "n_shot": told["n-shot"],
        "n_samples": told["n-samples"],
        "task_versions": told["versions"],
        "higher_is_better": told["higher_is_better"],
        "limit": limit,
        "batch_size": auto if batch_size == "auto" else batch_size,
        "bos": _bos_policy(lm),
        "tokenizer": lm.tokenizer_name,
        "max_length": lm.max_length,
        "device": str(lm.device),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "seconds": round(time.time() - started, 2),
    }
    if log_samples:
        record["samples"] = _plain(told["samples"])
    if around:
        record["within"] = _plain(around)
        names.append(f"under-{around['name']}")
    path = _record_path(names, place) if output is None else Path(output)
    if path is not None:
        with writable(path.parent):
            write_json(path, record)
        record["path"] = str(path)
    return record


def _manager(names: list[str], include_path: str | Path | None) -> TaskManager:
    """One that knows the tasks; lm-eval's own thousands are read only where a name is not local."""
    if not names:
        raise SparsekitError("no tasks: name some, as in --tasks lambada_openai,arc_easy")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"{include_path}: no such folder of tasks; paths are relative to {Path.cwd()}")
    paths = None if include_path is None else str(include_path)
    with _quiet():
        manager = TaskManager(include_path=paths, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            where = "among lm-eval's own" if paths is None else f"in {paths} or among lm-eval's own"
            raise UnknownNameError(f"--tasks {name}: no such task {where}{near}")
    return manager


def _open(
    target: Any,
    tokenizer: Tokenizer | None,
    batch_size: int | str,
    device: str,
    dtype: str | torch.dtype,
    add_bos: bool,
    seed: int,
) -> tuple[Any, Path | None]:
    """The model as lm-eval wants it, and its checkpoint's folder."""
    if isinstance(target, str) and target.startswith(HUGGING_FACE):
        _batch_size(batch_size)
        return _hugging_face(target.removeprefix(HUGGING_FACE), batch_size, device, dtype, add_bos), None
    place = None
    if isinstance(target, (str, Path, Run)):
        target = resolve(target, weights=True)
    if isinstance(target, Target):
        place = target.checkpoint
    lm = SparsekitLM(target, tokenizer, batch_size=batch_size, device=device, dtype=dtype, add_bos=add_bos, seed=seed)
    return lm, place


def _tokenizer(target: Target) -> Tokenizer:
    """The one it was trained with; of a bare spec, one trained on its data."""
    if target.tokenizer_file is not None:
        return target.tokenizer()
    data = target.spec.data
    return load_tokenizer(data.tokenizer, data.source.cls(data.source.params))


def _hugging_face(path: str, batch_size: int | str, device: str, dtype: str | torch.dtype, add_bos: bool) -> Any:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SparsekitError(f"{HUGGING_FACE}{path}: {error}; pip install 'sparsekit[eval]'") from None
    try:
        return HFLM(pretrained=path, batch_size=batch_size, device=device, dtype=dtype_of(dtype), add_bos_token=add_bos)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{HUGGING_FACE}{path}: cannot be loaded ({str(error).splitlines()[0]})") from None


def _bos_policy(lm: Any) -> str:
    if isinstance(lm, SparsekitLM):
        return lm.bos_policy
    where = "every context and text" if lm.add_bos_token else "empty contexts and rolling texts"
    return f"token {lm.prefix_token_id} before {where}"


def _name(target: Any) -> str:
    if isinstance(target, Run):
        return str(target.folder)
    if isinstance(target, Target):
        return str(target.checkpoint or target.spec.name)
    return str(target) if isinstance(target, (str, Path)) else type(target).__name__


def _record_path(names: list[str], checkpoint: Path | None) -> Path | None:
    """RUN/eval/step-00000500.TASKS.json."""
    if checkpoint is None:
        return None
    run = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint
    return run / "eval" / f"{checkpoint.name}.{'+'.join(names)[:100].replace('/', '-')}.json"


def _plain(value: Any) -> Any:
    """As JSON can say it: what is not finite is null, and what lm-eval could not work out too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if value == "N/A":
        return None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)


def _batch_size(given: int | str) -> int | None:
    """None for auto.

    Raises:
        SparsekitError: neither auto nor a number of sequences.
    """
    if given == "auto":
        return None
    if str(given).isdecimal() and int(given) > 0:
        return int(given)
    raise SparsekitError(f"--batch-size {given}: give auto, or how many sequences run at a time")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks on what is as it should be."""
    logger = logging.getLogger("lm_eval")
    level, commit = logger.level, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # of whatever folder one stands in; git complains where that is none
    try:
        with redirect_stdout(sys.stderr):  # where it prints how far it is
            yield
    finally:
        logger.setLevel(level)
        evaluator.get_git_commit_hash = commit
