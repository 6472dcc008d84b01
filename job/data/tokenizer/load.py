"""Loads the tokenizer with its chat template. Imports transformers lazily and nothing else heavy.

Knows which special tokens are in effect: an EOS that opens turns instead of ending them is corrected, and generation
stops wherever the model's own files say so. Text is encoded by `job.data.tokenizer.encoder`.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.data.examples import JsonObject, Turn
from job.data.tokenizer import settings
from job.data.tokenizer.chat_template import TEXT_BLOCKS, RefusedError, Template, bundled_template
from job.data.tokenizer.encoder import Encoder
from job.data.tokenizer.file_check import Difference, check_embeddings, class_contradicts, find_difference, prepare
from job.data.tokenizer.own_templates import notes_on, other_templates, own_template
from job.data.tokenizer.trial import Trial
from job.inputs import model_files
from job.runtime.errors import DataError

FILE_USED = (
    "the class {} makes other tokens than tokenizer.json by itself; tokenizer.json is used, and the result is "
    "published with the class PreTrainedTokenizerFast, which does as it says"
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Encoder):
    """A fast tokenizer, the chat template in effect, and what follows from both."""

    blocks: Mapping[str, Template]
    """The text block for each format without roles."""
    named: Mapping[str, Template]
    """The tokenizer's other templates by name, such as `tool_use`, if its own are in effect."""
    end_of_turn_ids: tuple[int, ...]
    """The tokens that end an assistant turn; empty without a template, or if the template puts nothing there."""
    eos_token_id: int
    other_stop_ids: tuple[int, ...] = ()
    """Further tokens that end generation by the model's `generation_config.json`, e.g. after a tool call (Llama 3.1,
    gpt-oss)."""
    of_file: bool = False
    """Whether it is that of `tokenizer.json`, of which the class in `tokenizer_config.json` makes another."""
    embedding_rows: int | None = None
    """How many tokens the model has embeddings for; None if that is not known."""
    notes: tuple[str, ...]
    """What the user should know, e.g. that the tokenizer's EOS was wrong."""

    @property
    def name(self) -> str:
        """`tokenizer`, the template's name, `file`, or `none`."""
        return self.chat.name if self.chat else "none"

    @property
    def template(self) -> str | None:
        """The Jinja text in effect."""
        return self.chat.text if self.chat else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which generation stops: EOS, the end of a turn if it is one token, and the model's others."""
        end = self.end_of_turn_ids if len(self.end_of_turn_ids) == 1 else ()
        return tuple(dict.fromkeys((self.eos_token_id, *end, *self.other_stop_ids)))

    @functools.cached_property
    def spelt_end(self) -> str:
        """The text that ends a turn, if it is several tokens; else empty."""
        return self.chat.end_of_turn if self.chat and len(self.end_of_turn_ids) > 1 else ""

    def template_for(self, format: str) -> Template:  # noqa: A002 - the domain's word
        """The chat template, or without one the text block of a format. Raises DataError if the format has none."""
        if self.chat:
            return self.chat
        if format in self.blocks:
            return self.blocks[format]
        raise DataError(
            f"The data has the format `{format}`, which needs a chat template, and the tokenizer has none.",
            remedy="Set TUNE_CHAT_TEMPLATE, e.g. to chatml, or to the name of the template the model was tuned with.",
        )

    def render(self, turns: Sequence[Turn], *, add_generation_prompt: bool, tools: Sequence[JsonObject] = ()) -> str:
        """A conversation as text by the chat template. Raises RefusedError if the template does."""
        return self.template_for("messages").render(turns, add_generation_prompt=add_generation_prompt, tools=tools)


def import_without_torch() -> None:
    """Import transformers and datasets without torch, which both import if it is installed: this saves seconds, and
    tokens do not need it. Only for a process that never trains."""
    # With None in sys.modules, an import fails as if the module was not installed.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        import datasets  # noqa: F401, PLC0415
        from transformers import AutoTokenizer  # noqa: F401, PLC0415
        from transformers.utils import is_torch_available  # noqa: PLC0415

        is_torch_available()  # caches its result
    finally:
        if sys.modules["torch"] is None:
            del sys.modules["torch"]  # datasets would take the entry for the module


def load_tokenizer(
    directory: Path,
    *,
    name: str = "",
    chat_template: str = "tokenizer",
    template_text: str | None = None,
    date: dt.date,
) -> Tokenizer:
    """Load a model's tokenizer, from local files only, once it was tried where it can do no harm (`Trial`).

    Args:
        directory: with the model's files and no others (`model_files.folder_of`).
        name: of the model, for messages.
        chat_template: `tokenizer` (its own) or the name of one of the job's templates.
        template_text: the content of a Jinja file, which takes precedence over `chat_template`.
        date: the date that templates may print.

    Raises:
        DataError: there is no fast tokenizer, it needs custom code, it does not do what its `tokenizer.json` says, it
            or a template takes too much time or memory, or a configuration is damaged.
        ConfigError: a template name is unknown.
    """
    name, file = name or directory.name, directory / model_files.TOKENIZER
    with Trial(file if file.exists() else None, name=name) as trial:
        hf, notes = _loaded(directory, name, trial), settings.template_notes(directory, name)
        difference = find_difference(hf, trial) if file.exists() else None
        if difference is not None:
            hf = _of_file(difference, directory, name, trial)
            notes = (*notes, FILE_USED.format(settings.class_name(directory, name)))
        own, variables = own_template(hf), {**hf.special_tokens_map, "date_string": str(date)}
        others = ((text, f"chat template `{which}` of {name}") for which, text in other_templates(hf).items())
        for text, what in ((own, f"chat template of {name}"), *others, (template_text, "chat template `file`")):
            if text:
                trial.render(text, variables, what=what)
    found = wrap_tokenizer(hf, chat_template=chat_template, template_text=template_text, date=date)
    rows = settings.embedding_rows(directory, name)
    return replace(
        found,
        notes=(*found.notes, *notes, *check_embeddings(found, rows, name)),
        of_file=difference is not None,
        other_stop_ids=_other_stop_ids(found, settings.stop_ids(directory, name)),
        embedding_rows=rows,
    )


def _loaded(directory: Path, name: str, trial: Trial) -> Any:
    """The transformers tokenizer, of the class that its files ask for."""
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 - seconds to import, and only after job.tuning

    trial.opened()
    settings.check_versions(directory, name)
    place, local = str(directory.absolute()), {"local_files_only": True, "trust_remote_code": False}
    try:
        found = (directory / model_files.CONFIG).exists()
        config = AutoConfig.from_pretrained(place, **local) if found else None
    except Exception as error:
        raise DataError(
            f"config.json of {name} is not one that transformers can use: {_words(error)}.",
            remedy="Correct it, or use a model whose architecture is part of transformers.",
        ) from error
    try:
        return AutoTokenizer.from_pretrained(place, config=config, **local)
    except Exception as error:
        raise DataError(
            f"The tokenizer of {name}, of the class {settings.class_name(directory, name)}, cannot be loaded: "
            f"{_words(error)}.",
            remedy="The model needs a tokenizer.json that works without custom code; save one with "
            "AutoTokenizer.save_pretrained where its code is trusted.",
        ) from error


def _of_file(difference: Difference, directory: Path, name: str, trial: Trial) -> Any:
    """The tokenizer that `tokenizer.json` describes, where its class only cuts texts into other pieces.

    Raises:
        DataError: the class loses text, or no class does what the file says: then it is not clear which is right.
    """
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - as above

    if difference.loses_text:
        raise class_contradicts(difference, directory, name)
    place = str(directory.absolute())
    hf = PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    left = find_difference(hf, trial)
    if left is not None:
        raise class_contradicts(left, directory, name)
    return hf


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__


def _other_stop_ids(found: Tokenizer, given: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the generation configuration without EOS, and without tokens that open answers."""
    opening = set(found.encode(found.chat.generation_prompt).ids) if found.chat else set()
    return tuple(number for number in given if number not in {*opening, found.eos_token_id})


def wrap_tokenizer(
    hf: Any, *, chat_template: str = "tokenizer", template_text: str | None = None, date: dt.date
) -> Tokenizer:
    """The same for a transformers tokenizer that is already loaded. Sets its template and EOS to those in effect."""
    if not hf.is_fast:
        raise DataError(
            f"{type(hf).__name__} is not a fast tokenizer: it cannot say which characters a token covers, so the "
            "answers cannot be found.",
            remedy="Convert it to a tokenizer.json.",
        )
    prepare(hf)
    own, others = own_template(hf), other_templates(hf) if chat_template == "tokenizer" and not template_text else {}
    notes = _correct_eos(hf, _template(hf, "tokenizer", own, date)) if own else ()
    chat = _chosen(hf, own, chat_template, template_text, date)
    end_ids = tuple(hf(chat.end_of_turn, add_special_tokens=False)["input_ids"]) if chat else ()
    if hf.eos_token_id is None:
        raise DataError("The tokenizer has no EOS token.", remedy="Set eos_token in its tokenizer_config.json.")
    if chat:
        hf.chat_template = chat.text
    return Tokenizer(
        hf=hf,
        chat=chat,
        blocks={name: _template(hf, name, bundled_template(name), date) for name in TEXT_BLOCKS},
        named={name: _template(hf, name, text, date) for name, text in others.items()},
        bos_ids=_bos_ids(hf),
        end_of_turn_ids=end_ids,
        eos_token_id=hf.eos_token_id,
        notes=(*notes, *_end_notes(chat, end_ids), *notes_on(others)),
    )


def _chosen(hf: Any, own: str | None, chat_template: str, template_text: str | None, date: dt.date) -> Template | None:
    """The template that the settings name, tested on a question and an answer."""
    if template_text is not None:
        chosen = _template(hf, "file", template_text, date)
    elif chat_template != "tokenizer":
        chosen = _template(hf, chat_template, bundled_template(chat_template), date)
    elif own:
        chosen = _template(hf, "tokenizer", own, date)
    else:
        return None
    try:
        _ = chosen.end_of_turn, chosen.generation_prompt
    except RefusedError as error:
        raise DataError(
            f"The chat template `{chosen.name}` cannot render a question with its answer: {error}.",
            remedy="Correct the template, or set TUNE_CHAT_TEMPLATE to another.",
        ) from error
    return chosen


def _template(hf: Any, name: str, text: str, date: dt.date) -> Template:
    """The text with its variables bound, in transformers' sandbox. Its date is the given one, never the clock's."""
    from transformers.utils.chat_template_utils import _compile_jinja_template  # noqa: PLC0415 - see `load`

    variables = {"bos_token": "", **hf.special_tokens_map, "strftime_now": date.strftime}
    if not re.search(r"date_string\s*=|set\s+date_string", text):  # at inference, a template prints its own default
        variables["date_string"] = date.strftime("%d %b %Y")

    def apply(messages: list[JsonObject], tools: list[JsonObject] | None, add_generation_prompt: bool) -> str:
        # As render_jinja_template does, without its overhead for lists of conversations.
        rendered: str = _compile_jinja_template(text).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return rendered

    return Template(name=name, text=text, apply=apply, eos=hf.eos_token or "")


def _correct_eos(hf: Any, own: Template) -> tuple[str, ...]:
    """Replace an EOS that is part of the generation prompt: it opens turns, so it cannot end them. Returns notes."""
    try:
        opening, ending = own.generation_prompt, own.end_of_turn
    except RefusedError:
        return ()
    wrong = hf.eos_token
    if wrong is None or wrong not in opening or ending == wrong:
        return ()
    if hf.convert_tokens_to_ids(ending) in (None, hf.unk_token_id):
        return (f"the tokenizer's EOS {wrong} opens turns, but {ending!r} is not a single token that could replace it",)
    hf.eos_token = ending
    return (f"the tokenizer's EOS is {wrong}, which opens turns; {ending}, which ends them, is used instead",)


def _bos_ids(hf: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer itself puts before a text."""
    plain, whole = hf("a", add_special_tokens=False)["input_ids"], hf("a")["input_ids"]
    starts = (number for number in range(len(whole)) if whole[number : number + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def _end_notes(chat: Template | None, end_ids: tuple[int, ...]) -> tuple[str, ...]:
    if chat is None:
        return ()
    if not end_ids:
        return (f"the template `{chat.name}` puts nothing after an answer, so the model does not learn to stop",)
    if len(end_ids) > 1:
        note = f"the template `{chat.name}` ends an answer with {chat.end_of_turn!r}, which is {len(end_ids)} tokens"
        return (f"{note} of this tokenizer: is it the right template for this model?",)
    return ()
