"""What a generation task asks and how an output is read: items, templates, parsing, scoring.

Reasoning follows Hu et al. 2023 (LLM-Adapters): generate an answer and parse it, or compare the
likelihood of the choices. Instruction tuning is scored with ROUGE-L. Nothing here reads a file.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from armada_lib import profiles

TOLERANCE = 1e-3  # between a parsed number and the gold one, as in Hu et al.


@dataclass(frozen=True)
class Item:
    """One question with what is needed to ask, train on and score it.

    `response`: the text to train on; in a test set the gold answer said in the training format.
    `question`, `options`: the question itself, without the request around it ("Please choose ...",
    "Answer format: ..."). `answer`: the gold label, letter or number, or None. `references`: texts
    for ROUGE-L. `choices`: what each option is answered with, for the likelihood protocol.
    """

    id: str
    instruction: str
    input: str
    response: str
    question: str
    options: tuple[str, ...] = ()
    answer: str | None = None
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def prompt_text(self) -> str:
        """Instruction and input, before a template is put around them."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    @property
    def teacher_text(self) -> str:
        """What the teacher reads: question and options joined by spaces (A15), no request.

        Text encoders of image models read 77 tokens: a request repeated in every text would
        take a third of them and say nothing.
        """
        return " ".join((self.question, *self.options))


@dataclass(frozen=True)
class Template:
    """Two format strings, each ending in the marker after which the response stands.

    ValueError for one that does not, or whose fields are not `instruction` (and `input`).
    """

    with_input: str
    without_input: str
    marker: str

    def __post_init__(self) -> None:
        for text, wanted in (
            (self.with_input, {"instruction", "input"}),
            (self.without_input, {"instruction"}),
        ):
            if not self.marker.strip() or not text.rstrip().endswith(self.marker):
                raise ValueError(
                    f"template {text[:40]!r}...: it must end with its response marker "
                    f"{self.marker!r}; without it the response cannot be told from the prompt"
                )
            fields = {f for _, f, _, _ in string.Formatter().parse(text) if f is not None}
            if fields != wanted:
                raise ValueError(
                    f"template {text[:40]!r}...: it has the fields {sorted(fields)}, "
                    f"it needs {sorted(wanted)} (write {{{{ and }}}} for braces)"
                )


_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."

# "chat" is the chat template of the tokenizer.
TEMPLATES: dict[str, Template | None] = {
    "alpaca": Template(
        f"{_TASK}, paired with an input that provides further context. {_WRITE}\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        f"{_TASK}. {_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
        "### Response:",
    ),
    "plain": Template(
        "{instruction}\n{input}\n\nAnswer:\n", "{instruction}\n\nAnswer:\n", "Answer:"
    ),
    "chat": None,
}


def prompt(item: Item, template: str | Template, tokenizer: Any = None) -> str:
    """The text the student continues with `item.response`.

    Raises `Unknown` for a template that is not there and ValueError for "chat" without a
    tokenizer that has a chat template.
    """
    known = (
        template
        if isinstance(template, Template)
        else TEMPLATES[profiles.check(template, TEMPLATES, "template")]
    )
    if known is not None:
        text = known.with_input if item.input else known.without_input
        return text.format(instruction=item.instruction, input=item.input)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "template 'chat': it needs a tokenizer with a chat template, as instruction-tuned "
            f"checkpoints have; use one of {', '.join(t for t in TEMPLATES if t != 'chat')}"
        )
    turn = [{"role": "user", "content": item.prompt_text}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


# ---------------------------------------------------------------- reading an answer
def cut(output: str) -> str:
    """The output up to where a model begins another prompt of the alpaca template."""
    return re.split(r"###\s*(?:Instruction|Input|Response)\s*:", output)[0].strip()


def label(word: str, count: int, output: str) -> str | None:
    """The FIRST `word1` .. `word<count>`, as in Hu et al., in lower case; None if there is none.

    Wider than theirs in two points: capitals and one space are allowed ("Answer 2"), and
    "answer12" is not read as answer1.
    """
    found = re.search(rf"\b{word} ?([1-{count}])(?!\d)", output, re.IGNORECASE)
    return f"{word}{found[1]}" if found else None


_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\uff0d"), "-")
_NUMBER = re.compile(
    r"((?<![\w)\]%.])-\$?)?"  # no sign after a digit or bracket: "9-4" ends in 4
    r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)"  # not inside a word: the 2 of "m2" is no answer
    r"(?:/(\d+)(?![\d/]))?"
)


def number(output: str) -> float | None:
    """The LAST number of the output, as in Hu et al.; None if there is none.

    Commas between groups of three digits are dropped ("1,234.50"), others separate (Hu et al.
    drop all: "3,4" is 34). Currency and percent signs are ignored; Unicode minus signs count;
    "3/4" is 0.75. Mixed numbers ("1 1/2"), powers of ten and numbers in words are not read.
    """
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", output.translate(_MINUS))
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, above, below = found[-1]
    if below and not int(below):
        return None
    return float(above) / float(below or 1) * (-1 if sign else 1)


_CUE = r"(?i:answer|option|choice)(?:\s+is)?\s*[:=]?\s+\**"
_SAID = re.compile(
    r"(?<!\w)\(\s*([A-Ea-e])\s*\)"  # (B), but not the A of P(A)
    rf"|{_CUE}([A-E])(?![\w'’-])(?! [a-z])"
    rf"|{_CUE}([a-e])(?=\s*(?:[).*]|$))",
    re.MULTILINE,
)
_ALONE = re.compile(r"(?<![\w'’-])(?!A [a-z])([A-E])(?![\w'’-])")


def letter(output: str) -> str | None:
    """The option A to E that the output settles on; None if it names none.

    The last letter in brackets or after "answer", "option" or "choice" (is); if there is none,
    the last capital that stands alone and is not the article ("A train ..."). Hu et al. take the
    first capital A-E anywhere, which reads "Because" as B and "A train" as A.
    """
    said = _SAID.findall(output)
    if said:
        return "".join(said[-1]).upper()
    alone = _ALONE.findall(output)
    return alone[-1] if alone else None


PARSERS: dict[str, Callable[[str], str | float | None]] = {
    "answer": partial(label, "answer", 5),
    "ending": partial(label, "ending", 4),
    "option": partial(label, "option", 2),
    "number": number,
    "letter": letter,
}


# ---------------------------------------------------------------- scoring
class Score(NamedTuple):
    """`percent` is the mean of `each`, float64 (n,), 0 to 100; `unparsed` outputs count as 0."""

    percent: float
    each: np.ndarray
    unparsed: int


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(output: str, references: Sequence[str]) -> float:
    """Highest ROUGE-L F over the references, 0 to 1: `rouge-score`, Porter stemmer on.

    Its tokeniser keeps lower-cased a-z and 0-9 only, so texts in other scripts score 0.
    """
    return max(_rouge().score(r, output)["rougeL"].fmeasure for r in references)


def score(parse: str, outputs: Sequence[str], items: Sequence[Item]) -> Score:
    """Accuracy, or mean ROUGE-L F if `parse` is "text", of one output per item, in percent.

    An output without an answer (for "text": an empty one) counts as wrong and as unparsed.
    Raises ValueError for no items, another number of outputs, or an item without an answer.
    """
    profiles.check(parse, (*PARSERS, "text"), "way to read an answer")
    if not items or len(outputs) != len(items):
        raise ValueError(f"{len(outputs)} outputs for {len(items)} items; need one per item, not 0")
    each = np.zeros(len(items))
    unparsed = 0
    for n, (output, item) in enumerate(zip(outputs, items, strict=True)):
        if (not item.references) if parse == "text" else (item.answer is None):
            raise ValueError(f"{item.id}: no answer to score against")
        text = cut(output)
        got = (text or None) if parse == "text" else PARSERS[parse](text)
        unparsed += got is None
        if got is None:
            continue
        if parse == "text":
            each[n] = 100 * rouge_l(text, item.references)
        elif isinstance(got, float):
            each[n] = 100.0 * (abs(got - float(item.answer or "nan")) <= TOLERANCE)
        else:
            each[n] = 100.0 * (got == item.answer)
    return Score(float(each.mean()), each, unparsed)


def disagrees(item: Item) -> bool:
    """Whether a training response ends in another number than the answer that its file gives."""
    try:
        gold = float((item.answer or "").replace(",", ""))
    except ValueError:
        return False  # no answer, or one in words
    said = number(item.response)
    return said is None or abs(said - gold) > TOLERANCE


def candidates(item: Item) -> list[str]:
    """The responses whose likelihoods are compared, in the order of the options.

    Each parses to its own label, so the picked one is scored like an output. ValueError for an item
    without choices.
    """
    if not item.choices:
        raise ValueError(
            f"{item.id}: no choices, so the likelihood protocol does not apply; "
            "use generate-and-parse"
        )
    return list(item.choices)


def pick(logliks: Sequence[float], lengths: Sequence[int], normalise: bool) -> int:
    """Index of the likeliest candidate; the first one at a tie.

    `logliks`: summed log-probability of each candidate's tokens, in nats; `lengths`: its number of
    tokens, by which the sum is divided if `normalise`. ValueError unless each has both, and
    for nan.
    """
    sums, counts = np.asarray(logliks, dtype=np.float64), np.asarray(lengths)
    if sums.ndim != 1 or sums.shape != counts.shape or not len(sums) or (counts < 1).any():
        raise ValueError(
            f"{sums.size} log-likelihoods and {counts.size} lengths; need one of each per "
            "candidate and at least one token each"
        )
    if np.isnan(sums).any():
        raise ValueError("a log-likelihood is not a number")
    return int(np.argmax(sums / counts if normalise else sums))
