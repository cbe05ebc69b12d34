"""A model: adapters come and go beside it, texts and tensors go in."""

import dataclasses
import html
import json
import pathlib
from typing import Any, Iterator, Sequence

import torch

from moesaic import bars
from moesaic._native import Job, Native, classes, dumps, refuse_copies, routes_page
from moesaic.errors import ShapeError, UsageError, translated

METHODS = ("lora", "ia3", "mov", "molora")


class Answer(str):
    """A generated text.

    Attributes: ids, the tokens (an end of sequence included); finish_reason, "stop" or "length"; score, of beam search.
    """

    ids: list[int]
    finish_reason: str
    score: float


def _answer(row: dict) -> Answer:
    answer = Answer(row["text"])
    answer.ids, answer.finish_reason, answer.score = row["ids"], row["finish_reason"], row["score"]
    return answer


@dataclasses.dataclass
class Score:
    """log p(ids[i] | what stands before it), of the last len(logprobs) of ids; float64 [n]."""

    ids: list[int]
    logprobs: torch.Tensor

    @property
    def sum(self) -> float:
        return float(self.logprobs.sum())

    @property
    def perplexity(self) -> float:
        return float(torch.exp(-self.logprobs.mean()))


class Table(list):
    """Rows, dicts of the same keys; notebooks show them as a table."""

    def __repr__(self):
        if not self:
            return "(no rows)"
        rows = [list(self[0])] + [[str(value).replace("\n", "\\n") for value in row.values()] for row in self]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def _repr_html_(self):
        cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
        return "<table>" + (cells(self[0], "th") if self else "") + "".join(cells(row.values(), "td") for row in self) + "</table>"

    def frame(self):
        """The same as a pandas DataFrame."""
        import pandas
        return pandas.DataFrame(self)


class Routes:
    """Which experts a text and tasks use. `json` is what `moesaic routes` writes."""

    def __init__(self, json: dict):
        self.json = json

    def _text(self):
        if self.json["text"] is None:
            raise UsageError("routes: got tasks alone, expected a text, whose tokens these are")
        return self.json["text"]

    @property
    def tokens(self) -> list[str]:
        return self._text()["tokens"]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of the text: the probabilities [tokens, experts] by site; of several owners "owner/site"."""
        owners = self._text()["routers"]
        return {site if len(owners) == 1 else f"{owner}/{site}": torch.tensor(rows)
                for owner, sites in owners.items() for site, rows in sites.items()}

    def frame(self):
        """A pandas DataFrame: site, token, text, expert, weight."""
        import pandas
        return pandas.DataFrame([
            {"site": site, "token": t, "text": self.tokens[t], "expert": e, "weight": float(weight)}
            for site, rows in self.weights.items() for t, row in enumerate(rows) for e, weight in enumerate(row)])

    def page(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes the page of `moesaic routes`, which needs nothing from outside."""
        path = pathlib.Path(path)
        path.write_text(routes_page(self.json))
        return path

    def _repr_html_(self):
        return f'<iframe srcdoc="{html.escape(routes_page(self.json))}" width="100%" height="640" style="border:0"></iframe>'


def load(path: str | pathlib.Path, *, device: str = "auto", dtype: str = "auto", quantize: str = "none") -> "Model":
    """Opens a folder with config.json, a .gguf file, a composition's folder or an adapter's, which knows its base.

    device: auto (a GPU where there is one), cpu, cuda, cuda:N. dtype: auto (bfloat16 where the hardware is faster in
    it), float32, bfloat16. quantize: none or int8, of the frozen weights. Raises UsageError, DataError and its kinds.
    """
    return Model(path, device=device, dtype=dtype, quantize=quantize)


class Model:
    """See `load`. One thread at a time: a second call meanwhile is a UsageError."""

    def __init__(self, path, *, device="auto", dtype="auto", quantize="none"):
        if quantize not in ("none", "int8"):
            raise UsageError(f"quantize: got {quantize!r}, expected 'none' or 'int8'")
        self._native = Native(translated(classes.Model)(str(path), str(device), str(dtype).removeprefix("torch."),
                                                        quantize == "int8"))
        self.training = False
        self._look_at_prompts()

    def _look_at_prompts(self):
        """How prompts are put; facts cost more than a prompt's tokens."""
        facts = self.facts
        self._chats, self._prompts_apart = facts["chat_template"], facts["prompts_apart"]

    # --- what it is

    @property
    def facts(self) -> dict[str, Any]:
        """model_type, vocab_size, width, blocks, parameters, device, dtype, eos_ids, adapters, structure, sites, ..."""
        return json.loads(self._native.facts())

    @property
    def path(self) -> str:
        return self.facts["model"]

    @property
    def adapters(self) -> list[str]:
        return [adapter["name"] for adapter in self.facts["adapters"]]

    def __repr__(self):
        facts = self.facts
        adapters = "".join(f", {each['name']} ({each['method']}, {each['num_experts']} experts)" for each in facts["adapters"])
        return (f"<moesaic {facts['model_type']}, {facts['parameters']:,} parameters in {facts['dtype']} on {facts['device']}"
                f"{adapters}>")

    def __copy__(self):
        refuse_copies("model")

    def __deepcopy__(self, _):
        refuse_copies("model")

    def __reduce__(self):
        refuse_copies("model")

    # --- adapters

    def attach(self, what: str | pathlib.Path, name: str | None = None, *, scale: float = 1.0, seed: int = 42, **keys) -> str:
        """Puts an adapter beside the model: a new one (lora, ia3, mov, molora), trainable, or a folder's, frozen.

        keys, of a new one, are a run file's: num_experts, lora_rank, lora_alpha, lora_target, router={...}, ... (docs/config.md).
        scale multiplies a folder's effect. Returns its name: `name`, else the method's or the folder's.
        """
        if isinstance(what, str) and what in METHODS:
            if pathlib.Path(what).is_dir():
                raise UsageError(f"attach: {what!r} is a method and a folder here, expected one; the folder is ./{what}")
            if scale != 1.0:
                raise UsageError(f"scale: got {scale} for a new adapter, expected a folder's")
            name = name or what
            self._native.attach_new(name, dumps({"finetuning_type": what, **keys}), seed)
            return name
        folder = pathlib.Path(what)
        if keys:
            raise UsageError(f"attach: got {', '.join(keys)} with the folder {folder}, whose settings are its own")
        if not folder.is_dir():
            raise UsageError(f"attach: got {str(what)!r}, expected a method ({', '.join(METHODS)}) or an adapter's folder")
        name = name or folder.resolve().name
        self._native.attach_folder(name, str(folder), float(scale))
        self._look_at_prompts()
        return name

    def _one(self, name):
        if name is not None:
            return name
        if len(self.adapters) != 1:
            raise UsageError(f"name: got none, expected one of the adapters: {', '.join(self.adapters) or 'there is none'}")
        return self.adapters[0]

    def detach(self, name: str | None = None) -> None:
        """Takes an adapter away; without a name, the only one."""
        self._native.detach(self._one(name))
        self._look_at_prompts()

    def save(self, folder: str | pathlib.Path, name: str | None = None) -> pathlib.Path:
        """Writes an adapter as a run does, for `attach`, `moesaic --adapter` and, of one expert, PEFT. Overwrites nothing."""
        self._native.save(self._one(name), str(folder))
        return pathlib.Path(folder)

    def named_parameters(self, name: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapter's tensors, live: an optimiser's steps are the model's. Float32."""
        yield from self._native.parameters(self._one(name))

    def parameters(self, name: str | None = None) -> Iterator[torch.Tensor]:
        for _, tensor in self.named_parameters(name):
            yield tensor

    def base_parameters(self) -> Iterator[torch.Tensor]:
        """The frozen weights."""
        yield from self._native.base_parameters()

    def state_dict(self, name: str | None = None) -> dict[str, torch.Tensor]:
        return {key: tensor.detach() for key, tensor in self.named_parameters(name)}

    def requires_grad_(self, on: bool = True, name: str | None = None) -> "Model":
        self._native.set_trainable(self._one(name), on)
        return self

    def trainable(self, name: str | None = None) -> Table:
        """What is trained: tensor, shape, numbers."""
        return Table({"tensor": key, "shape": " x ".join(map(str, tensor.shape)), "numbers": tensor.numel()}
                     for key, tensor in self.named_parameters(name) if tensor.requires_grad)

    def zero_grad(self) -> None:
        for name in self.adapters:
            for tensor in self.parameters(name):
                tensor.grad = None

    def train(self, mode: bool = True) -> "Model":
        """Dropout and router jitter are on in calls (torch's random numbers)."""
        self.training = mode
        return self

    def eval(self) -> "Model":
        return self.train(False)

    # --- tensors in, tensors out

    def ragged(self, ids: torch.Tensor, offsets: torch.Tensor, borders: Sequence[Sequence[int]] = (), *, adapters=None,
               losses: bool = False):
        """Logits [N, V] float32, with their graph, of sequences laid end to end.

        ids: [N] int64. offsets: [B+1] int64, rising from 0 to N. borders: for each sequence the numbers of its tokens
        behind which prompts end; an encoder-decoder reads what stands before the first. adapters: names, or weights by
        name; None is all of them. With losses, (logits, {"balance": ..., "z": ...}): means over the trained routers.
        Raises ShapeError, DataError for ids outside of the vocabulary.
        """
        asked = "" if adapters is None else dumps(adapters)
        ids, offsets = torch.as_tensor(ids), torch.as_tensor(offsets)
        logits, *more = self._native.forward(ids, offsets, [list(each) for each in borders], asked, self.training, losses)
        return (logits, dict(zip(("balance", "z"), more))) if losses else logits

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, adapters=None,
                 losses: bool = False):
        """Logits [B, T, V] of a padded batch [B, T], zero where attention_mask [B, T] is. Of decoders."""
        if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise ShapeError(f"input_ids: got {list(input_ids.shape)}, attention_mask "
                             f"{None if attention_mask is None else list(attention_mask.shape)}, expected two of [B, T]")
        if self._prompts_apart:
            raise UsageError("got a padded batch for an encoder-decoder, expected `ragged` with borders")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if not real.any(1).all():
            raise ShapeError("attention_mask: got a row of zeros, expected a token in every sequence")
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0).cpu()])
        made = self.ragged(input_ids[real], offsets, adapters=adapters, losses=losses)
        rows = made[0] if losses else made
        logits = rows.new_zeros((*real.shape, rows.shape[1])).index_put((real.to(rows.device).nonzero(as_tuple=True)), rows)
        return (logits, made[1]) if losses else logits

    # --- texts

    def encode(self, prompt: str | Sequence[dict], *, tools: Sequence[dict] = (), raw: bool = False) -> list[int]:
        """The tokens of a prompt as `generate` gives it to the model: a conversation, or a text, which is a user's
        message where the model has a chat template, unless it is raw."""
        if isinstance(prompt, str):
            if raw or not self._chats:
                if tools:
                    raise UsageError("tools: got some for a text, expected a model with a chat template")
                return self._native.text_ids(prompt, True)
            prompt = [{"role": "user", "content": prompt}]
        return self._native.chat_ids(dumps(list(prompt)), dumps(list(tools) or None))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._native.decode([int(id) for id in ids], skip_special_tokens)

    def generate(self, prompt, *, max_new_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0, repetition_penalty: float = 1.0, stop: str | Sequence[str] = (), num_beams: int = 1,
                 length_penalty: float = 1.0, early_stopping: bool | str = False, num_return_sequences: int = 1, seed: int = 42,
                 batch_size: int = 8, adapters=None, tools: Sequence[dict] = (), raw: bool = False, stream: bool = False):
        """Answers a text or a conversation ([{"role", "content"}]); a list of these gives a list of answers.

        An answer is a str that knows its ids and why it ended. temperature 0 is greedy. With num_return_sequences above
        1, a list for each prompt. adapters: names, or weights by name; None is all. stream: an iterator over the pieces
        of the one answer. An interrupt ends it.
        """
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict))
        prompts = [self.encode(each, tools=tools, raw=raw) for each in ([prompt] if one else prompt)]
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
                   "repetition_penalty": repetition_penalty, "stop": [stop] if isinstance(stop, str) else list(stop),
                   "num_beams": num_beams, "length_penalty": length_penalty,
                   "early_stopping": str(early_stopping).lower(), "num_return_sequences": num_return_sequences, "seed": seed,
                   "batch_size": batch_size}
        if adapters is not None:
            options["adapters"] = adapters
        if stream and (not one or num_return_sequences > 1 or num_beams > 1):
            raise UsageError("stream: got several answers, expected one prompt, one answer and no beams")
        if not prompts:
            return []
        job = Job(self._native.generate(prompts, dumps(options)))
        if stream:
            return _pieces(job)
        answers = [_answer(row) for row in job.follow()]
        if num_return_sequences > 1:
            answers = [answers[i:i + num_return_sequences] for i in range(0, len(answers), num_return_sequences)]
        return answers[0] if one else answers

    def score(self, text: str | Sequence[int], answer: str | None = None) -> Score:
        """log-probabilities of a text's tokens (special tokens as the tokenizer puts them), or of `answer` behind it."""
        if answer is None:
            ids = self._native.text_ids(text, False) if isinstance(text, str) else [int(id) for id in text]
            if len(ids) < 2:
                raise UsageError(f"score: got {len(ids)} tokens, expected at least 2: the first has nothing before it")
            return Score(ids, torch.tensor(self._native.score([ids], [])[0], dtype=torch.float64))
        prompt = self._native.text_ids(text, True) if isinstance(text, str) else [int(id) for id in text]
        ids = self._native.answer_ids(answer)
        return Score(ids, torch.tensor(self._native.score([prompt], [ids])[0], dtype=torch.float64))

    def evaluate(self, tasks: str | Sequence[str] = (), *, suite: str | None = None, limit: int = 0, num_fewshot: int | None = None,
                 generate: bool = False, data_dir: str = ".", batch_size: int = 0, apply_chat_template: bool | None = None,
                 target_delimiter: str | None = None, score_eos: bool = False, max_gen_toks: int = 0, until: Sequence[str] = (),
                 metrics: Sequence[str] = (), confirm_run_unsafe_code: bool = False, seed: int = 42, show: bool = True) -> dict:
        """Scores tasks as `moesaic eval` does, whose --help explains each; returns its JSON, with "samples" by task."""
        return self._follow(self._native.evaluate, dict(
            tasks=_names(tasks), suite=suite, limit=limit, num_fewshot=num_fewshot, generate=generate, data_dir=data_dir,
            batch_size=batch_size, apply_chat_template=apply_chat_template, target_delimiter=target_delimiter,
            score_eos=score_eos, max_gen_toks=max_gen_toks, until=list(until), metrics=list(metrics),
            confirm_run_unsafe_code=confirm_run_unsafe_code, seed=seed), show)

    def routes(self, text: str = "", *, tasks: str | Sequence[str] = (), limit: int = 50, data_dir: str = ".",
               apply_chat_template: bool | None = None, show: bool = True) -> Routes:
        """Which experts a user's message, and tasks, use; what connections of a composition read."""
        return Routes(self._follow(self._native.routes, dict(
            text=text, tasks=_names(tasks), limit=limit, data_dir=data_dir, apply_chat_template=apply_chat_template), show))

    def _follow(self, work, options, show):
        progress = bars.OfTasks(show)
        try:
            return Job(work(dumps({key: value for key, value in options.items() if value is not None}))).follow(progress)
        finally:
            progress.close()


def _names(tasks) -> list[str]:
    return [str(tasks)] if isinstance(tasks, (str, pathlib.Path)) else [str(task) for task in tasks]


def _pieces(job: Job) -> Iterator[str]:
    for row in job.told():
        yield row["text"]
    job.result()
